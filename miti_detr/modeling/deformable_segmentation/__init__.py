"""Deformable-DETR with masks, from the mask head of DETR.

N images, S tokens of all levels, C width, h x w cells of the coarsest level that is a feature of
the backbone. The published Deformable-DETR has no masks; the heads look at this level as those of
DETR look at its only one.
"""

from typing import Any

from torch import Tensor

from miti_detr.modeling.deformable import DeformableDetr, EncodedPyramid
from miti_detr.modeling.segmentation import MaskPrediction, SegmentationDetr
from miti_detr.modeling.segmentation.prediction import Grid
from miti_detr.modeling.stages import Decoded, Encoded, SetPrediction


class DeformableSegmentationDetr(SegmentationDetr, DeformableDetr):
    """A :class:`DeformableDetr` whose queries have masks; ``MODEL.MASK_ON True`` makes one."""

    def grid(self, encoded: Encoded, decoded: Decoded) -> Grid:
        """Return the tokens of the last feature's level as a grid."""
        assert isinstance(encoded, EncodedPyramid)
        shapes = encoded.pyramid.shapes
        last = len(self.levels) - 1
        height, width = shapes[last]
        start = sum(h * w for h, w in shapes[:last])

        def cells(tokens: Tensor) -> Tensor:
            """Tokens (N, S, ...) of that level, (N, h, w, ...)."""
            return tokens[:, start : start + height * width].unflatten(1, (height, width))

        source, memory = (cells(x).permute(0, 3, 1, 2) for x in (encoded.source, decoded.memory))
        return Grid(source, memory, None if encoded.mask is None else cells(encoded.mask))

    def losses(
        self, prediction: SetPrediction, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Weighted losses of boxes, masks and, in a two-stage model, proposals."""
        losses = super().losses(prediction, batched_inputs)
        if isinstance(prediction, MaskPrediction) and prediction.proposals is not None:
            targets = self.targets(batched_inputs, prediction.boxes.dtype)
            losses |= self.proposal_losses(prediction.proposals, targets)
        return losses


DeformableDetr.with_masks = DeformableSegmentationDetr
