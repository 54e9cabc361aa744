"""Deformable-DETR and its variant with the layer residual.

N images, S tokens of all levels, Q object queries, L decoder layers, C width, K classes.
Source: Deformable DETR (Zhu et al., 2021); fundamentalvision/Deformable-DETR
``models/deformable_detr.py`` at 11169a6.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn

from miti_detr.layers import MLP, build_position_encoding
from miti_detr.modeling.classification import ClassLoss
from miti_detr.modeling.detr import MitiDetr
from miti_detr.modeling.stages import Decoded, Encoded, ObjectQueries, SetPrediction
from miti_detr.modeling.targets import Target

from .neck import LevelProjections
from .pyramid import Pyramid
from .transformer import DeformableTransformer, head_of


@dataclasses.dataclass(frozen=True)
class EncodedPyramid(Encoded):
    """A batch of images as the transformer takes it: tokens of all levels.

    ``source`` and ``position`` are (N, S, C), ``mask`` is (N, S).

    Attributes:
        pyramid: where the tokens lie.
    """

    pyramid: Pyramid


@dataclasses.dataclass(frozen=True)
class DecodedBoxes(Decoded):
    """Output of the transformer, whose ``memory`` is (N, S, C).

    Attributes:
        boxes: (L, N, Q, 4) of the decoder layers.
        proposals: of the encoder in a two-stage model.
        layer: index of the first of the decoder layers.
    """

    boxes: Tensor
    proposals: SetPrediction | None = None
    layer: int = 0

    def last(self) -> "DecodedBoxes":
        """The last decoder layer only, L = 1."""
        layer = self.layer + len(self.states) - 1
        return dataclasses.replace(
            self, states=self.states[-1:], boxes=self.boxes[-1:], layer=layer
        )


@dataclasses.dataclass(frozen=True)
class TwoStagePrediction(SetPrediction):
    """A set prediction with the encoder's proposals.

    Attributes:
        proposals: logits (1, N, S, K) and boxes (1, N, S, 4) of all tokens.
    """

    proposals: SetPrediction


@META_ARCH_REGISTRY.register()
class DeformableDetr(MitiDetr):
    """Deformable-DETR: single or multi-scale, with box refinement, in two stages.

    State-dict keys are the published ones except below ``backbone.body``. Heads that several
    decoder layers share, and those that the published model repeats below its decoder, are there
    once.
    """

    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList
    transformer: DeformableTransformer
    transformer_class = DeformableTransformer

    @configurable
    def __init__(self, *, levels: Sequence[str] = (), **detr: Any) -> None:
        """Build a model from its parts.

        Args:
            levels: features that become levels, by increasing stride; by default all of the
                backbone.
            detr: arguments of :class:`MitiDetr`.
        """
        self.levels: tuple[str, ...] = tuple(levels) or detr["backbone"].in_features
        super().__init__(**detr)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that ``cfg`` names.

        Raises:
            ValueError: for values that are not supported.
        """
        detr = cfg.MODEL.DETR
        parts = super().from_config(cfg)
        encoding = build_position_encoding(detr.POSITION_EMBEDDING, detr.HIDDEN_DIM, centred=True)
        levels = parts["backbone"].in_features
        return {**parts, "position_encoding": encoding, "levels": levels}

    def make_input_proj(self, transformer: DeformableTransformer) -> nn.Module:
        """Make the projections of the levels."""
        channels = [self.backbone.channels[name] for name in self.levels]
        return LevelProjections(channels, transformer.d_model, transformer.num_levels)

    @torch.no_grad()
    def make_heads(self, transformer: DeformableTransformer, class_loss: ClassLoss) -> None:
        """Make query embeddings and heads: one of each kind, or one for each decoder layer.

        At first a box is its reference, with a width and height of 0.12 if that is a point.
        """
        d_model = transformer.d_model
        class_embed = class_loss.make_head(d_model)
        bbox_embed = MLP(d_model, d_model, 4, num_layers=3)
        for parameter in bbox_embed.layers[-1].parameters():
            nn.init.zeros_(parameter)
        count = 1
        if transformer.box_refinement:
            count = len(transformer.decoder.layers) + transformer.two_stage
        self.class_embed = nn.ModuleList(copy.deepcopy(class_embed) for _ in range(count))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(bbox_embed) for _ in range(count))
        if not transformer.two_stage:
            self.query_embed = nn.Embedding(self.num_queries, 2 * d_model)
            first: Any = self.bbox_embed[0]
            first.layers[-1].bias[2:] = -2.0

    @property
    def variant(self) -> dict[str, Any]:
        """What decides the function beside the weights and their shapes."""
        return {**super().variant, "features": list(self.levels)}

    @property
    def has_idle_parts(self) -> bool:
        """Whether there are heads without a loss."""
        return self.transformer.box_refinement and not self.criterion.deep_supervision

    def embed_queries(self, batched_inputs: list[dict[str, Any]]) -> ObjectQueries:
        """Return the object queries, which a two-stage model takes from its proposals."""
        return ObjectQueries(None if self.transformer.two_stage else self.query_embed.weight)

    def encode(self, images: ImageList) -> EncodedPyramid:
        """Compute the features of a batch, and tokens and positions of all levels."""
        features = self.backbone(images)
        used = [features[name] for name in self.levels]
        levels = self.input_proj([feature.tensor for feature in used])
        masks = [feature.mask for feature in used]
        stride = self.backbone.strides[self.levels[-1]]
        for level in levels[len(used) :]:
            stride *= 2
            masks.append(self.backbone.mask_of(images, level, stride))
        pyramid = Pyramid.from_masks(masks, self.device)
        source = _tokens(levels)
        position = _tokens([self.position_encoding(mask) for mask in masks]).to(source.dtype)
        return EncodedPyramid(features, source, pyramid.mask, position, pyramid)

    def decode(self, encoded: Encoded, queries: ObjectQueries) -> DecodedBoxes:
        """Run the transformer."""
        assert isinstance(encoded, EncodedPyramid)
        found = self.transformer(
            encoded.source,
            encoded.position,
            encoded.pyramid,
            queries.embed,
            self.class_embed,
            self.bbox_embed,
        )
        return DecodedBoxes(found.states, found.memory, queries, found.boxes, found.proposals)

    def apply_heads(self, encoded: Encoded, decoded: Decoded) -> SetPrediction:
        """Compute the logits of the decoder states, whose boxes the transformer has computed."""
        assert isinstance(decoded, DecodedBoxes)
        logits = [
            head_of(self.class_embed, layer)(states)
            for layer, states in enumerate(decoded.states, start=decoded.layer)
        ]
        found = torch.stack(logits), decoded.boxes
        if decoded.proposals is None:
            return SetPrediction(*found)
        return TwoStagePrediction(*found, decoded.proposals)

    def losses(
        self, prediction: SetPrediction, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Weighted losses; those of proposals, whose only class is "object", end in ``_enc``.

        Args:
            prediction: of all decoder layers.
            batched_inputs: as in :meth:`forward`.

        Raises:
            ValueError: as in the base class.
        """
        targets = self.targets(batched_inputs, prediction.boxes.dtype)
        losses = self.criterion(prediction.logits, prediction.boxes, targets)
        if isinstance(prediction, TwoStagePrediction):
            losses |= self.proposal_losses(prediction.proposals, targets)
        return losses

    def proposal_losses(self, proposals: SetPrediction, targets: list[Target]) -> dict[str, Tensor]:
        """Weighted losses of the encoder's proposals, whose only class is "object"."""
        objects: list[Target] = [
            {"labels": torch.zeros_like(target["labels"]), "boxes": target["boxes"]}
            for target in targets
        ]
        return self.criterion(proposals.logits, proposals.boxes, objects, suffix="_enc")


def _tokens(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
