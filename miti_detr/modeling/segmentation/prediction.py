"""What the masks of a batch are computed from.

N images, H x W padded batch in pixels, Q queries, C width, h' x w' grid of the mask logits.
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from miti_detr.modeling.backbones.masked_backbone import MaskedBackbone
from miti_detr.modeling.stages import SetPrediction

from .postprocess import Size

MASK_STRIDE = 4  # of the finest feature and so of masks, pixels, unless another one is listed
PYRAMID_LEVELS = 3  # features beside the encoded one, at most


class Grid(NamedTuple):
    """The feature whose cells queries look at.

    Attributes:
        source: projected feature (N, C, h, w), before the encoder.
        memory: encoder output (N, C, h, w).
        mask: (N, h, w) bool, True = padding; None if nothing is padded.
    """

    source: Tensor
    memory: Tensor
    mask: Tensor | None


@dataclasses.dataclass(frozen=True)
class MaskPrediction(SetPrediction):
    """A set prediction with what its masks are computed from.

    Attributes:
        states: decoder states (N, Q, C) of the last layer.
        grid: of the encoded feature.
        pyramid: other features (N, C', h'', w'') of the backbone, the coarsest first.
        padded: H and W.
        masks: logits (N, Q, h', w') of the last decoder layer, filled by ``predict`` only: training
            and inference need the masks of some queries.
        proposals: of the encoder of a two-stage model.
    """

    states: Tensor
    grid: Grid
    pyramid: tuple[Tensor, ...]
    padded: Size = (0, 0)
    masks: Tensor | None = None
    proposals: SetPrediction | None = None

    def of_image(self, index: int) -> "MaskPrediction":
        """The prediction of one image of the batch, N = 1."""
        part = slice(index, index + 1)
        source, memory, mask = self.grid
        return dataclasses.replace(
            self,
            logits=self.logits[:, part],
            boxes=self.boxes[:, part],
            states=self.states[part],
            grid=Grid(source[part], memory[part], None if mask is None else mask[part]),
            pyramid=tuple(x[part] for x in self.pyramid),
        )


def with_pyramid(backbone: MaskedBackbone, *, encodes_all: bool = False) -> MaskedBackbone:
    """Let a backbone also return the features that masks need.

    These are the other ones that ``MODEL.DETR.IN_FEATURES`` lists, or all other outputs of the
    backbone with a stride of at least 4, and not smaller; of more than three the largest.

    Args:
        backbone: whose last feature is encoded.
        encodes_all: all that is listed is encoded, so that it says nothing about masks.

    Returns:
        One with the same body; the features by increasing stride, then the encoded one.

    Raises:
        ValueError: there is no other feature.
    """
    shapes = backbone.body.output_shape()
    *listed, encoded = backbone.in_features
    names = [] if encodes_all else listed
    names = names or [name for name, shape in shapes.items() if shape.stride >= MASK_STRIDE]
    coarsest = shapes[encoded].stride
    others = [name for name in names if name != encoded and shapes[name].stride <= coarsest]
    others.sort(key=lambda name: shapes[name].stride)
    if not others:
        raise ValueError(
            f"MODEL.MASK_ON is True, but the backbone has no output larger than {encoded}: add "
            "some, such as MODEL.RESNETS.OUT_FEATURES \"['res2', 'res3', 'res4', 'res5']\""
        )
    used = others[:PYRAMID_LEVELS]
    levels = [name for name in listed if encodes_all and name not in used]
    return MaskedBackbone(
        backbone.body,
        in_features=(*used, *levels, encoded),
        padding_mask=backbone.padding_mask,
        size_divisibility=backbone.size_divisibility,
    )
