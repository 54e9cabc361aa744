"""The meta-architecture: DETR and Miti-DETR in Detectron2.

N images, H x W padded batch in pixels, h x w feature grid, Q queries, L decoder layers, C width, K
classes.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from miti_detr.checkpoint import adapt_state_dict, record_variant
from miti_detr.checkpoint.pixels import Pixels, expected_pixels, warn_if_pixels_differ
from miti_detr.layers import MLP, Linear, build_position_encoding

from .backbones.masked_backbone import MaskedBackbone
from .compilation import require_compiler
from .criterion import SetCriterion
from .heads import SetPrediction, predict_set
from .matcher import HungarianMatcher
from .postprocess import detections
from .queries import ObjectQueries
from .recompute import recompute_activations
from .targets import Target, targets_from_instances
from .transformer import LayerResidual, ResidualTransformer


def inference_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Precision of evaluation and prediction; None: that of the weights.

    Raises:
        ValueError: for a precision that is unknown, or that the device does not have.
    """
    precision = cfg.SOLVER.AMP.PRECISION
    if precision not in ("float16", "bfloat16"):
        raise ValueError(f"SOLVER.AMP.PRECISION is {precision!r}; use float16 or bfloat16")
    if not cfg.TEST.AMP.ENABLED:
        return None
    if precision == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise ValueError(
            "SOLVER.AMP.PRECISION is 'float16', which needs a GPU; on a CPU set it to bfloat16"
        )
    return getattr(torch, precision)


@META_ARCH_REGISTRY.register()
class MitiDetr(nn.Module):
    """Detection as set prediction: backbone, transformer, one box and class per object query.

    The stages of :meth:`forward` are methods of their own: :meth:`preprocess_image`,
    :meth:`embed_queries`, :meth:`encode_image`, :meth:`decode`, :meth:`apply_heads`, then
    :meth:`losses` or :meth:`inference`. State-dict keys are the published ones except below
    ``backbone.body``, which are the Detectron2 backbone's.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

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
        size_divisibility: int = 0,
        inference_dtype: torch.dtype | None = None,
        activation_checkpoint: bool = False,
        compiled: bool = False,
        variant: dict[str, Any] | None = None,
        weights_residual: str = "",
    ) -> None:
        """Put the parts together.

        Args:
            backbone: images to one feature map with its padding mask.
            position_encoding: padding mask to position encoding, C channels.
            transformer: :class:`ResidualTransformer` or another with its interface, width C.
            criterion: the set loss.
            num_classes: K.
            num_queries: Q.
            pixel_mean: per channel, in the units and channel order of the input images.
            pixel_std: per channel, likewise.
            size_divisibility: of padded batches, in pixels; 0: no more padding than needed.
            inference_dtype: precision of autocast in evaluation mode; None: as the caller has it.
            activation_checkpoint: see :func:`~miti_detr.modeling.recompute.recompute_activations`.
            compiled: run backbone and transformer by ``torch.compile``; state-dict keys stay.
            variant: what a checkpoint should say about the function that the weights are for; None:
                what the parts say.
            weights_residual: the layer residual that files without such a record were trained with.
        """
        super().__init__()
        d_model = transformer.d_model
        self.backbone = backbone
        self.position_encoding = position_encoding
        self.input_proj = nn.Conv2d(backbone.num_channels, d_model, kernel_size=1)
        self.transformer = transformer
        self.query_embed = nn.Embedding(num_queries, d_model)
        self.class_embed = Linear(d_model, num_classes + 1)
        self.bbox_embed = MLP(d_model, d_model, 4, num_layers=3)
        self.criterion = criterion
        self.num_classes = num_classes
        self.size_divisibility = size_divisibility
        self.inference_dtype = inference_dtype
        if activation_checkpoint:
            recompute_activations(self)
        if compiled:
            self.backbone.body.compile()
            self.transformer.compile()
        self.variant = self._own_variant() if variant is None else variant
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.weights_residual = weights_residual
        self.register_state_dict_post_hook(record_variant)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that ``cfg`` names.

        Raises:
            ValueError: for values that are not supported.
        """
        detr = cfg.MODEL.DETR
        if cfg.MODEL.MASK_ON or detr.FROZEN_WEIGHTS:
            raise ValueError(
                "MODEL.MASK_ON and MODEL.DETR.FROZEN_WEIGHTS belong to mask prediction, which "
                "MitiDetr does not have: set MODEL.MASK_ON False and MODEL.DETR.FROZEN_WEIGHTS ''"
            )
        if cfg.MODEL.COMPILE:
            require_compiler(cfg.MODEL.DEVICE)
        warn_if_pixels_differ(
            cfg.MODEL.WEIGHTS,
            expected_pixels(cfg.MODEL.WEIGHTS),
            Pixels(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT),
        )
        backbone = MaskedBackbone(
            build_backbone(cfg),
            in_features=detr.IN_FEATURES,
            padding_mask=detr.PADDING_MASK,
            fast_conv=cfg.MODEL.ACCELERATE,
        )
        if cfg.SOLVER.BACKBONE_MULTIPLIER <= 0:
            backbone.requires_grad_(False)
        weights = {
            "class_weight": detr.CLASS_WEIGHT,
            "l1_weight": detr.L1_WEIGHT,
            "giou_weight": detr.GIOU_WEIGHT,
        }
        return {
            "backbone": backbone,
            "position_encoding": build_position_encoding(detr.POSITION_EMBEDDING, detr.HIDDEN_DIM),
            "transformer": ResidualTransformer(cfg),
            "criterion": SetCriterion(
                num_classes=detr.NUM_CLASSES,
                matcher=HungarianMatcher(**weights),
                **weights,
                no_object_weight=detr.NO_OBJECT_WEIGHT,
                deep_supervision=detr.DEEP_SUPERVISION,
            ),
            "num_classes": detr.NUM_CLASSES,
            "num_queries": detr.NUM_OBJECT_QUERIES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": detr.SIZE_DIVISIBILITY,
            "inference_dtype": inference_dtype(cfg),
            "activation_checkpoint": detr.ACTIVATION_CHECKPOINT,
            "compiled": cfg.MODEL.COMPILE,
            "variant": {
                "layer_residual": detr.LAYER_RESIDUAL,
                "layer_residual_in": detr.LAYER_RESIDUAL_IN,
                "pre_norm": detr.PRE_NORM,
                "padding_mask": detr.PADDING_MASK,
                "num_classes": detr.NUM_CLASSES,
            },
            "weights_residual": detr.WEIGHTS_RESIDUAL,
        }

    def _own_variant(self) -> dict[str, Any]:
        keys = ("layer_residual", "layer_residual_in", "pre_norm")
        known = {k: getattr(self.transformer, k) for k in keys if hasattr(self.transformer, k)}
        padding_mask = self.backbone.padding_mask
        return {**known, "padding_mask": padding_mask, "num_classes": self.num_classes}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    @property
    def residual_strength(self) -> float:
        """Factor of the layer residual, in [0, 1]: 1 but while it is ramped up.

        It is recorded with the weights and restored with them. A model without a residual has 1.

        Raises:
            ValueError: when it is set to a value out of range.
        """
        return next((residual.strength for residual in self._residuals()), 1.0)

    @residual_strength.setter
    def residual_strength(self, strength: float) -> None:
        """Set it in every layer that has a residual."""
        if not 0 <= strength <= 1:
            raise ValueError(f"residual_strength {strength} is not between 0 and 1")
        for residual in self._residuals():
            residual.strength = strength

    def _residuals(self) -> list[LayerResidual]:
        modules = self.transformer.modules()
        return [m for m in modules if isinstance(m, LayerResidual) and m.placement != "none"]

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights of this model, or of another implementation of DETR after conversion.

        Weights of another variant are refused by a model in evaluation mode, since they fit and
        compute something else. Training may start from them; and so may a caller who loads
        strictly, which no checkpointer does.

        Raises:
            CheckpointError: for weights of another variant, or that do not fit.
        """
        adapted = adapt_state_dict(
            self, state_dict, stated=self.weights_residual, allow_other=self.training or strict
        )
        return super().load_state_dict(adapted, strict=strict, assign=assign)

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
        with self._precision():
            queries = self.embed_queries(batched_inputs)
            states = self.decode(*self.encode_image(images), queries)
            prediction = self.apply_heads(states if self.training else states[-1:])
        if self.training:
            return self.losses(prediction, batched_inputs, queries)
        return self.inference(prediction, batched_inputs, images.image_sizes)

    def predict(self, batched_inputs: list[dict[str, Any]]) -> SetPrediction:
        """Raw output of every decoder layer for the inputs that :meth:`forward` takes.

        Gradients and dropout are as the caller left them (``torch.no_grad``, :meth:`eval`).

        Returns:
            ``logits`` (L, N, Q, K+1) and ``boxes`` (L, N, Q, 4; ``cxcywh`` in [0, 1] of the
            un-padded image).
        """
        images = self.preprocess_image(batched_inputs)
        with self._precision():
            queries = self.embed_queries(batched_inputs)
            return self.apply_heads(self.decode(*self.encode_image(images), queries))

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast in evaluation mode, if it is asked for."""
        if self.training or self.inference_dtype is None:
            return nullcontext()  # and not a disabled autocast, which would end that of a caller
        return torch.autocast(self.device.type, self.inference_dtype)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise, then pad with zeros at the bottom and right: (N, 3, H, W).

        Raises:
            ValueError: an image is larger than the square that the backbone needs.
        """
        images = [
            (x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs
        ]
        constraints = self.backbone.padding_constraints(self.size_divisibility)
        square = constraints["square_size"]
        largest = max(max(image.shape[-2:]) for image in images)
        if 0 < square < largest:
            raise ValueError(
                f"an image has a side of {largest} pixels, the backbone takes at most {square}: "
                "lower INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST"
            )
        return ImageList.from_tensors(images, padding_constraints=constraints)

    def encode_image(self, images: ImageList) -> tuple[Tensor, Tensor, Tensor]:
        """Feature, padding mask and position encoding of a batch.

        Returns:
            (N, C, h, w); (N, h, w) bool, True = padding, on the host; (N, C, h, w).
        """
        feature, mask = self.backbone(images)
        source = self.input_proj(feature)
        return source, mask, self.position_encoding(mask).to(source.dtype)

    def embed_queries(self, batched_inputs: list[dict[str, Any]]) -> ObjectQueries:
        """The object queries of a batch: here the same for any."""
        return ObjectQueries(self.query_embed.weight)

    def decode(
        self, source: Tensor, mask: Tensor, position: Tensor, queries: ObjectQueries
    ) -> Tensor:
        """Decoder states (L, N, Q, C) of the object queries."""
        padding = mask.to(source.device) if mask.any() else None
        # By keyword, and only if there is one: not every registered transformer needs to know it.
        grouped = {} if queries.mask is None else {"query_mask": queries.mask}
        states, _ = self.transformer(source, padding, queries.embed, position, **grouped)
        return states

    def apply_heads(self, states: Tensor) -> SetPrediction:
        """Logits and boxes of decoder states (L, N, Q, C)."""
        return predict_set(states, self.class_embed, self.bbox_embed)

    def losses(
        self,
        prediction: SetPrediction,
        batched_inputs: list[dict[str, Any]],
        queries: ObjectQueries,
    ) -> dict[str, Tensor]:
        """Weighted losses against the ``instances`` of the inputs.

        Args:
            prediction: of all decoder layers.
            batched_inputs: as in :meth:`forward`.
            queries: what the decoder was asked; for models that learn from that, too.

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
        """One detection of each query of the last decoder layer, see :func:`detections`."""
        return detections(prediction.logits[-1], prediction.boxes[-1], image_sizes)
