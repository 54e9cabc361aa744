"""What the masks of a batch are computed from.

N images, H x W padded batch in pixels, Q queries, C width, h' x w' grid of the mask logits.
"""

import dataclasses

from torch import Tensor

from miti_detr.modeling.backbones.masked_backbone import Feature, MaskedBackbone
from miti_detr.modeling.stages import Encoded, SetPrediction

from .postprocess import Size

MASK_STRIDE = 4  # of the finest feature and so of masks, pixels, unless another one is listed
PYRAMID_LEVELS = 3  # features beside the encoded one, at most


@dataclasses.dataclass(frozen=True)
class MaskPrediction(SetPrediction):
    """A set prediction with what its masks are computed from.

    Attributes:
        encoded: the features of the images.
        states: decoder states (N, Q, C) of the last layer.
        memory: encoder output (N, C, h, w).
        padded: H and W.
        masks: logits (N, Q, h', w') of the last decoder layer, filled by ``predict`` only: training
            and inference need the masks of some queries.
    """

    encoded: Encoded
    states: Tensor
    memory: Tensor
    padded: Size = (0, 0)
    masks: Tensor | None = None

    def of_image(self, index: int) -> "MaskPrediction":
        """The prediction of one image of the batch, N = 1."""
        part = slice(index, index + 1)
        encoded, mask = self.encoded, self.encoded.mask
        features = {k: Feature(*(x[part] for x in v)) for k, v in encoded.features.items()}
        return dataclasses.replace(
            self,
            logits=self.logits[:, part],
            boxes=self.boxes[:, part],
            encoded=Encoded(
                features,
                encoded.source[part],
                None if mask is None else mask[part],
                encoded.position[part],
            ),
            states=self.states[part],
            memory=self.memory[part],
        )


def with_pyramid(backbone: MaskedBackbone) -> MaskedBackbone:
    """Let a backbone also return the features that masks need.

    These are the other ones that ``MODEL.DETR.IN_FEATURES`` lists, or all other outputs of the
    backbone with a stride of at least 4, and not smaller; of more than three the largest.

    Args:
        backbone: whose last feature is encoded.

    Returns:
        One with the same body; the features by increasing stride, then the encoded one.

    Raises:
        ValueError: there is no other feature.
    """
    shapes = backbone.body.output_shape()
    *listed, encoded = backbone.in_features
    names = listed or [name for name, shape in shapes.items() if shape.stride >= MASK_STRIDE]
    coarsest = shapes[encoded].stride
    others = [name for name in names if name != encoded and shapes[name].stride <= coarsest]
    others.sort(key=lambda name: shapes[name].stride)
    if not others:
        raise ValueError(
            f"MODEL.MASK_ON is True, but the backbone has no output larger than {encoded}: add "
            "some, such as MODEL.RESNETS.OUT_FEATURES \"['res2', 'res3', 'res4', 'res5']\""
        )
    return MaskedBackbone(
        backbone.body,
        in_features=(*others[:PYRAMID_LEVELS], encoded),
        padding_mask=backbone.padding_mask,
        size_divisibility=backbone.size_divisibility,
    )
