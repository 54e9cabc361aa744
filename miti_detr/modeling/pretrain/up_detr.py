"""UP-DETR: a detector learns, without labels, to find where patches of an image come from.

N images, M patches of each, Q queries, G = queries of each patch, L decoder layers, C width, F
channels of the backbone's feature.
Source: UP-DETR (Dai et al., 2021), sections 3.1 and 3.2; dddzg/up-detr ``models/updetr.py`` at
44c0c6e, with two differences: the mask of the queries is made for any number of patches (the
published loop counts the queries of a patch instead, which leaves rows without any query where
there are more patches than that), and features are reconstructed for matched queries
only, because others have no loss.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from miti_detr.layers import MLP
from miti_detr.modeling.criterion import Matches
from miti_detr.modeling.detr import MitiDetr
from miti_detr.modeling.stages import Decoded, Encoded, ObjectQueries, SetPrediction

from .matcher import OwnPatchMatcher

NUM_CLASSES = 2  # of a pre-training model; the first one has no objects
PATCH_CLASS = 1


@dataclasses.dataclass(frozen=True)
class PatchQueries(ObjectQueries):
    """Object queries that carry patches.

    Attributes:
        patch_features: (N, M, F) of the backbone, the target of the feature loss; no gradient.
    """

    patch_features: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class PatchPrediction(SetPrediction):
    """A set prediction with what the feature loss needs.

    Attributes:
        states: decoder states (L, N, Q, C).
        patch_features: of :class:`PatchQueries`.
    """

    states: Tensor
    patch_features: Tensor


def group_mask(num_patches: int, queries_per_patch: int) -> Tensor:
    """Who may attend to whom in the decoder: the queries of the same patch.

    Returns:
        (Q, Q) bool with Q = ``num_patches * queries_per_patch``, True = may attend: blocks along
        the diagonal.
    """
    patch = torch.arange(num_patches).repeat_interleave(queries_per_patch)
    return patch[:, None] == patch[None, :]


def feature_losses(predicted: Tensor, truth: Tensor, normalizer: Tensor) -> Tensor:
    """Squared distance of features of length 1, which is 2 - 2 cos of their angle.

    Args:
        predicted: (L, M, F).
        truth: (L, M, F).
        normalizer: scalar, the mean number of patches in a process' batch.

    Returns:
        (L,): summed over features and matches.
    """
    difference = F.normalize(predicted, dim=-1) - F.normalize(truth, dim=-1)
    return difference.square().sum((1, 2)) / normalizer


@META_ARCH_REGISTRY.register()
class UpDetr(MitiDetr):
    """Pre-training of DETR or Miti-DETR: random query patch detection.

    Each patch goes through the backbone of the image, is pooled and projected, and joins the
    embeddings of G queries, which do not see the queries of other patches. Patches are objects of
    class 1 of 2. With ``feature_weight`` > 0 the query that is matched with a patch has to
    reconstruct its feature as well.

    State-dict keys are those of :class:`MitiDetr` with ``patch2query`` and ``feature_align``, as
    published.
    """

    query_mask: Tensor

    @configurable
    def __init__(
        self,
        *,
        queries_per_patch: int,
        patch_dropout: float = 0.1,
        query_shuffle: bool = False,
        feature_weight: float = 1.0,
        **detr: Any,
    ) -> None:
        """Build a model from its parts.

        Args:
            queries_per_patch: G; divides the number of queries.
            patch_dropout: probability that a query is left without its patch, in training.
            query_shuffle: in training, give the query embeddings to the queries in random order,
                the same for all images of a batch.
            feature_weight: weight of the feature reconstruction; 0: there is no head for it.
            detr: arguments of :class:`MitiDetr`.

        Raises:
            ValueError: the queries cannot be divided; a value is out of range; the backbone takes
                images of one size only.
        """
        super().__init__(**detr)
        num_queries, width = self.query_embed.weight.shape
        if queries_per_patch < 1 or num_queries % queries_per_patch:
            raise ValueError(
                f"{num_queries} queries cannot be {queries_per_patch} for each patch: "
                "MODEL.DETR.NUM_OBJECT_QUERIES must be a multiple of INPUT.PATCHES.NUMBER"
            )
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout is {patch_dropout}; needed: 0 <= p < 1")
        if self.backbone.padding_constraints()["square_size"]:
            raise ValueError(
                "UpDetr needs a backbone that takes images of any size, which this one does not: "
                "set MODEL.BACKBONE.NAME to another one"
            )
        self.queries_per_patch = queries_per_patch
        self.patch_dropout = patch_dropout
        self.query_shuffle = query_shuffle
        self.feature_weight = feature_weight
        channels = self.backbone.channels[self.backbone.in_features[-1]]
        self.patch2query = nn.Linear(channels, width)
        if feature_weight > 0:
            self.feature_align = MLP(width, width, channels, num_layers=2)
        mask = group_mask(num_queries // queries_per_patch, queries_per_patch)
        self.register_buffer("query_mask", mask, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that ``cfg`` names.

        Raises:
            ValueError: for values that are not supported.
        """
        patches, queries = cfg.INPUT.PATCHES.NUMBER, cfg.MODEL.DETR.NUM_OBJECT_QUERIES
        if patches < 1 or queries % patches:
            raise ValueError(
                f"INPUT.PATCHES.NUMBER is {patches}; UpDetr needs at least 1, and a divisor of "
                f"MODEL.DETR.NUM_OBJECT_QUERIES {queries}"
            )
        if cfg.MODEL.DETR.NUM_CLASSES != NUM_CLASSES:
            raise ValueError(
                f"MODEL.DETR.NUM_CLASSES is {cfg.MODEL.DETR.NUM_CLASSES}; patches are class "
                f"{PATCH_CLASS} of {NUM_CLASSES}: set it to {NUM_CLASSES}"
            )
        if cfg.MODEL.DETR.CLASS_LOSS != "softmax":
            raise ValueError(
                f"MODEL.DETR.CLASS_LOSS is {cfg.MODEL.DETR.CLASS_LOSS!r}; UpDetr needs 'softmax'"
            )
        up_detr = cfg.MODEL.UP_DETR
        parts = super().from_config(cfg)
        if up_detr.MATCH_OWN:
            matcher = parts["criterion"].matcher
            parts["criterion"].matcher = OwnPatchMatcher(
                queries_per_patch=queries // patches,
                class_weight=matcher.class_weight,
                l1_weight=matcher.l1_weight,
                giou_weight=matcher.giou_weight,
                class_cost=matcher.class_cost,
            )
        return {
            **parts,
            "queries_per_patch": queries // patches,
            "feature_weight": up_detr.FEATURE_WEIGHT,
        }

    def embed_queries(self, batched_inputs: list[dict[str, Any]]) -> PatchQueries:
        """Query embeddings with the patches of each image joined to them.

        Args:
            batched_inputs: each with ``patches`` (M, 3, height, width), uint8, channels as in
                ``image``; M is the same in all of them and may be smaller than in training.

        Raises:
            ValueError: an input has no patches, or another number of them, or too many.
        """
        features = self._patch_features(batched_inputs)
        per_query = self.patch2query(features).repeat_interleave(self.queries_per_patch, dim=1)
        count = per_query.shape[1]
        embed = self.query_embed.weight[:count]
        if self.training and self.query_shuffle:
            embed = embed[torch.randperm(count, device=embed.device)]
        if self.training and self.patch_dropout > 0:
            drawn = torch.rand(*per_query.shape[:2], 1, device=per_query.device)
            per_query = per_query * (drawn > self.patch_dropout)
        mask = self.query_mask[:count, :count]
        # Detached, or a trained backbone could lower the feature loss by making all features alike.
        return PatchQueries(per_query + embed, mask, features.detach())

    def _patch_features(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Mean of the backbone's feature over each patch, (N, M, F)."""
        missing = [x for x in batched_inputs if "patches" not in x]
        if missing:
            name = missing[0].get("file_name", "an input")
            raise ValueError(
                f"{name} has no 'patches': UpDetr finds given patches of an image. To detect "
                "objects, fine-tune a MitiDetr from these weights"
            )
        counts = {len(x["patches"]) for x in batched_inputs}
        limit = len(self.query_mask) // self.queries_per_patch
        if len(counts) > 1 or not 1 <= max(counts) <= limit:
            raise ValueError(
                f"images of a batch have {sorted(counts)} patches; needed: the same number, at "
                f"least 1 and at most {limit} (queries / queries of a patch)"
            )
        patches = torch.stack([x["patches"] for x in batched_inputs]).flatten(0, 1)
        pixels = (patches.to(self.device) - self.pixel_mean) / self.pixel_std
        divisor = self.backbone.padding_constraints()["size_divisibility"]
        if any(side % divisor for side in pixels.shape[-2:]):
            raise ValueError(
                f"patches of {tuple(pixels.shape[-2:])} pixels: this backbone needs a multiple of "
                f"{divisor} in INPUT.PATCHES.SIZE"
            )
        sizes = [tuple(pixels.shape[-2:])] * len(pixels)
        feature = self.backbone(ImageList(pixels, sizes))[self.backbone.in_features[-1]].tensor
        return feature.mean((2, 3)).view(len(batched_inputs), -1, feature.shape[1])

    def apply_heads(self, encoded: Encoded, decoded: Decoded) -> PatchPrediction:
        """Compute logits and boxes of the decoder states, and keep the states beside them."""
        found = super().apply_heads(encoded, decoded)
        assert isinstance(decoded.queries, PatchQueries)
        assert decoded.queries.patch_features is not None
        return PatchPrediction(
            found.logits, found.boxes, decoded.states, decoded.queries.patch_features
        )

    def losses(
        self, prediction: SetPrediction, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Weighted losses of the patches: the set loss, and ``loss_feature``.

        Args:
            prediction: of :meth:`apply_heads`.
            batched_inputs: with ``instances``, one for each patch and in their order.

        Raises:
            ValueError: as in the base class, or if the instances are not one for each patch.
        """
        assert isinstance(prediction, PatchPrediction)
        targets = self.targets(batched_inputs, prediction.boxes.dtype)
        patches = prediction.patch_features.shape[1]
        if any(len(target["labels"]) != patches for target in targets):
            raise ValueError(f"{patches} patches need 'instances' of one box each, in their order")
        states, truth = prediction.states, prediction.patch_features.flatten(0, 1)

        def reconstruct(matches: Matches) -> dict[str, Tensor]:
            """The feature loss of matched queries; L values."""
            layers = states[-matches.num_layers :]
            asked = layers[matches.layer, matches.image, matches.query]
            dtype = self.patch2query.weight.dtype
            shape = (matches.num_layers, -1, truth.shape[-1])
            predicted = self.feature_align(asked.to(dtype)).view(shape)
            wanted = truth[matches.target].to(dtype).view(shape)
            loss = feature_losses(predicted, wanted, matches.num_boxes)
            return {"loss_feature": self.feature_weight * loss}

        extra = reconstruct if self.feature_weight > 0 else None
        return self.criterion(prediction.logits, prediction.boxes, targets, extra)

    def read_detections(
        self, prediction: SetPrediction, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Detections with the patch that each was asked for, as ``pred_patches``."""
        results = super().read_detections(prediction, image_sizes)
        for result in results:
            query = torch.arange(len(result), device=result.scores.device)
            result.pred_patches = query // self.queries_per_patch
        return results
