"""The meta-architecture: DETR and Miti-DETR in Detectron2.

N images padded to H x W pixels, h x w feature grid, Q queries, L layers, C width, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from miti_detr.accelerate.exchange import is_recorded
from miti_detr.accelerate.execution import PLAIN, Execution
from miti_detr.accelerate.kept_features import batch_of_features
from miti_detr.catalog import register_missing
from miti_detr.layers import MLP, at_least_float32, build_position_encoding
from miti_detr.model_keys import check_model_keys
from miti_detr.pixels import Pixels, expected_pixels, warn_if_pixels_differ

from .backbones.masked_backbone import Feature, MaskedBackbone
from .classification import ClassLoss
from .criterion import SetCriterion, build_criterion
from .postprocess import check_finite, detections
from .stages import Decoded, Encoded, ObjectQueries, SetPrediction
from .targets import Target, targets_from_instances
from .transformer import ResidualTransformer, TransformerLayer
from .variant import describe_parts, residuals_of

# Called with each new model. miti_detr.checkpoint, which must not be imported here, adds a function
# that records with the weights what they mean.
ON_CONSTRUCTION: list[Callable[["MitiDetr"], None]] = []


@META_ARCH_REGISTRY.register()
class MitiDetr(nn.Module):
    """Detection as set prediction: backbone, transformer, one box and class per object query.

    The stages of :meth:`forward` are methods, so that a subclass can override one of them:
    :meth:`preprocess_image`, :meth:`embed_queries`, :meth:`encode`, :meth:`decode`,
    :meth:`apply_heads`, then :meth:`losses` or :meth:`inference`. State-dict keys are the published
    ones except below ``backbone.body``, which are the Detectron2 backbone's.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    class_embed: nn.Module
    bbox_embed: nn.Module
    transformer: Any  # ResidualTransformer, or another with its interface
    transformer_class: ClassVar[type[Any]] = ResidualTransformer
    predicts_masks = False
    with_masks: "type[MitiDetr]"  # the subclass for MODEL.MASK_ON, which sets it

    def __new__(cls, *args: Any, **kwargs: Any) -> "MitiDetr":
        """Make a model with masks if the config asks for them (``MODEL.MASK_ON``)."""
        cfg = next(iter([*args, *kwargs.values()]), None)
        masks = "with_masks" in vars(cls) and isinstance(cfg, CfgNode) and cfg.MODEL.MASK_ON
        return super().__new__(cls.with_masks if masks else cls)

    @configurable
    def __init__(
        self,
        *,
        backbone: MaskedBackbone,
        position_encoding: nn.Module,
        transformer: ResidualTransformer,
        criterion: SetCriterion,
        num_classes: int,
        num_queries: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        execution: Execution = PLAIN,
    ) -> None:
        """Build a model from its parts.

        Args:
            backbone: images to features with their padding masks; the last feature is encoded.
            position_encoding: padding mask to position encoding, C channels.
            transformer: :class:`ResidualTransformer` or another with its interface, width C.
            criterion: the set loss.
            num_classes: K.
            num_queries: Q.
            pixel_mean: per channel, in the units and channel order of the input images.
            pixel_std: likewise.
            input_format: channel order of the input images, ``RGB`` or ``BGR``.
            execution: how the model is run; by default it is plain.
        """
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.backbone = backbone
        self.position_encoding = position_encoding
        self.input_proj = self.make_input_proj(transformer)
        self.transformer = transformer
        # Layer residual of weights that do not record theirs; "": they are DETR's.
        self.weights_residual: str = getattr(transformer, "weights_residual", "")
        self.make_heads(transformer, criterion.class_loss)
        self.criterion = criterion
        self.read_classes = criterion.class_loss.read
        self.pixels = {
            "pixel_mean": [float(x) for x in pixel_mean],
            "pixel_std": [float(x) for x in pixel_std],
            "input_format": input_format,
        }
        self.execution = execution
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        execution.apply(self, TransformerLayer)
        for function in ON_CONSTRUCTION:
            function(self)

    def make_input_proj(self, transformer: Any) -> nn.Module:
        """Make the projection of the backbone's feature to the width of the transformer."""
        feature = self.backbone.in_features[-1]
        return nn.Conv2d(self.backbone.channels[feature], transformer.d_model, kernel_size=1)

    def make_heads(self, transformer: Any, class_loss: ClassLoss) -> None:
        """Make the query embeddings and the heads of classes and boxes."""
        d_model = transformer.d_model
        self.query_embed = nn.Embedding(self.num_queries, d_model)
        self.class_embed = class_loss.make_head(d_model)
        self.bbox_embed = MLP(d_model, d_model, 4, num_layers=3)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that ``cfg`` names; a ValueError names values that are not supported."""
        check_model_keys(cfg)
        register_missing(cfg)
        detr = cfg.MODEL.DETR
        if (cfg.MODEL.MASK_ON or detr.FROZEN_WEIGHTS) and not cls.predicts_masks:
            raise ValueError(
                f"{cls.__name__}: set MODEL.MASK_ON False and MODEL.DETR.FROZEN_WEIGHTS ''"
            )
        backbone = MaskedBackbone(
            build_backbone(cfg),
            in_features=detr.IN_FEATURES,
            padding_mask=detr.PADDING_MASK,
            size_divisibility=detr.SIZE_DIVISIBILITY,
        )
        if cfg.SOLVER.BACKBONE_MULTIPLIER <= 0:
            backbone.requires_grad_(False)
        weights = cfg.MODEL.WEIGHTS
        warn_if_pixels_differ(weights, expected_pixels(weights), Pixels.of_config(cfg))
        transformer = cls.transformer_class(cfg)
        transformer.weights_residual = detr.WEIGHTS_RESIDUAL
        return {
            "backbone": backbone,
            "position_encoding": build_position_encoding(detr.POSITION_EMBEDDING, detr.HIDDEN_DIM),
            "transformer": transformer,
            "criterion": build_criterion(cfg),
            "num_classes": detr.NUM_CLASSES,
            "num_queries": detr.NUM_OBJECT_QUERIES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "execution": Execution.from_config(cfg),
        }

    @property
    def variant(self) -> dict[str, Any]:
        """What determines the function besides the weights and their shapes; recorded with them."""
        return {**describe_parts(self), **self.pixels}

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.pixel_mean.device

    @property
    def residual_strength(self) -> float:
        """Factor of the layer residual, in [0, 1]: 1, except during the ramp.

        It is recorded with the weights and restored with them.

        Raises:
            ValueError: when it is set to a value out of range.
        """
        return next((residual.strength for residual in residuals_of(self.transformer)), 1.0)

    @residual_strength.setter
    def residual_strength(self, strength: float) -> None:
        """Set it in every layer that has a residual."""
        if not 0 <= strength <= 1:
            raise ValueError(f"residual_strength {strength} is not between 0 and 1")
        for residual in residuals_of(self.transformer):
            residual.strength = strength

    def forward(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Train or detect.

        Args:
            batched_inputs: Detectron2's dataset dicts, one per image, with ``image`` (3, H, W) in
                the channel order of ``INPUT.FORMAT``; in training also ``instances`` with
                ``gt_boxes`` and ``gt_classes``; in inference optionally ``height`` and ``width``
                of the output frame.

        Returns:
            In training the weighted losses of :class:`SetCriterion`; in inference for each image
            ``{"instances": Instances}`` with ``pred_boxes`` (``xyxy`` pixels of the output frame,
            clipped, empty ones dropped), ``scores``, ``pred_classes``.
        """
        images = self.preprocess_image(batched_inputs)
        prediction = self.predict_set(images, batched_inputs, all_layers=self.training)
        if self.training:
            return self.losses(prediction, batched_inputs)
        return self.inference(prediction, batched_inputs, images.image_sizes)

    def predict(self, batched_inputs: list[dict[str, Any]]) -> SetPrediction:
        """Compute the raw output of every decoder layer for the inputs of :meth:`forward`.

        Gradients and dropout are as the caller left them (``torch.no_grad``, :meth:`eval`).

        Returns:
            Logits (L, N, Q, K+1; K with focal loss) and boxes; see :class:`SetPrediction`.
        """
        return self.predict_set(self.preprocess_image(batched_inputs), batched_inputs)

    def predict_set(
        self, images: ImageList, batched_inputs: list[dict[str, Any]], *, all_layers: bool = True
    ) -> SetPrediction:
        """Run the network on a padded batch.

        Args:
            images: of :meth:`preprocess_image`.
            batched_inputs: as in :meth:`forward`.
            all_layers: apply the heads to every decoder layer, not only to the last one.
        """
        with self.execution.precision(self):
            queries = self.embed_queries(batched_inputs)
            encoded = self.encode(images)
            decoded = self.decode(encoded, queries)
            return self.apply_heads(encoded, decoded if all_layers else decoded.last())

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise images, then pad them with zeros at the bottom and right: (N, 3, H, W).

        Inputs with ``features`` instead of an image have passed the backbone, see
        :class:`~miti_detr.data.kept_features.FeatureStore`.
        """
        if "features" in batched_inputs[0]:
            return batch_of_features(batched_inputs, self.backbone.strides, like=self.pixel_mean)
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for x in batched_inputs
        ]
        return self.backbone.batch(images)

    def embed_queries(self, batched_inputs: list[dict[str, Any]]) -> ObjectQueries:
        """Return the object queries of a batch; here they are the same for every batch."""
        return ObjectQueries(self.query_embed.weight)

    def encode(self, images: ImageList) -> Encoded:
        """Compute the features of a batch, and the tokens and positions of the last one."""
        return self.encode_features(self.backbone(images))

    def encode_features(self, features: dict[str, Feature]) -> Encoded:
        """Project the last feature, and encode the positions of its cells."""
        tensor, mask = features[self.backbone.in_features[-1]]
        source = self.input_proj(tensor)
        position = self.position_encoding(mask).to(source.dtype)
        # A batch without padding needs no mask, which is faster. A recorded model must have one.
        is_padded = is_recorded() or bool(mask.any())
        on_device = mask.to(source.device, non_blocking=True) if is_padded else None
        return Encoded(features, source, on_device, position)

    def decode(self, encoded: Encoded, queries: ObjectQueries) -> Decoded:
        """Run the transformer."""
        states, memory = self.transformer(
            encoded.source, encoded.mask, queries.embed, encoded.position, queries.mask
        )
        return Decoded(states, memory, queries)

    def apply_heads(self, encoded: Encoded, decoded: Decoded) -> SetPrediction:
        """Compute logits and boxes of the decoder states."""
        # Before the sigmoid, whose steps near 1 would be 1/256 in bfloat16.
        boxes = at_least_float32(self.bbox_embed(decoded.states)).sigmoid()
        return SetPrediction(self.class_embed(decoded.states), boxes)

    def losses(
        self, prediction: SetPrediction, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Weighted losses of all decoder layers against the ``instances`` of the inputs.

        Raises:
            ValueError: if the inputs have none, or class indices outside the model's.
        """
        targets = self.targets(batched_inputs, prediction.boxes.dtype)
        return self.criterion(prediction.logits, prediction.boxes, targets)

    def targets(self, batched_inputs: list[dict[str, Any]], dtype: torch.dtype) -> list[Target]:
        """The objects of the inputs, boxes in ``dtype``; raises as :meth:`losses` does."""
        if "instances" not in batched_inputs[0]:
            raise ValueError("training inputs need 'instances'; use model.eval() for inference")
        return targets_from_instances(
            [x["instances"] for x in batched_inputs],
            num_classes=self.num_classes,
            device=self.device,
            dtype=dtype,
        )

    def inference(
        self,
        prediction: SetPrediction,
        batched_inputs: list[dict[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Detections of the last decoder layer, in each input's output frame."""
        results = self.read_detections(prediction, image_sizes)
        if not is_recorded():
            check_finite(results, batched_inputs)
        return [
            {
                "instances": detector_postprocess(
                    result, inputs.get("height", size[0]), inputs.get("width", size[1])
                )
            }
            for result, inputs, size in zip(results, batched_inputs, image_sizes, strict=True)
        ]

    def read_detections(
        self, prediction: SetPrediction, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Detections of the last decoder layer, see :func:`detections`."""
        last = prediction.logits[-1], prediction.boxes[-1]
        return detections(*last, image_sizes, self.read_classes)
