"""Any backbone of Detectron2, with padding masks beside its features.

N images, H x W padded batch in pixels, h x w feature grid.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from detectron2.modeling import Backbone, ResNet
from detectron2.structures import ImageList
from torch import Tensor, nn

from miti_detr.accelerate.kept_features import KeptFeatures
from miti_detr.layers import feature_padding_mask


class Feature(NamedTuple):
    """One output of a backbone.

    Attributes:
        tensor: (N, C', h, w).
        mask: (N, h, w) bool, True = padding; on the host, which then need not wait for the device
            to learn whether anything is padded.
    """

    tensor: Tensor
    mask: Tensor


class MaskedBackbone(nn.Module):
    """A Detectron2 backbone that also returns which cells of its features are padding.

    Attributes:
        in_features: names of the outputs that are used, the one with the tokens of DETR last.
        channels: of each of these outputs.
        strides: of each of these outputs, in pixels per cell.
        has_idle_parts: it may have parameters that these outputs do not need.
    """

    def __init__(
        self,
        body: Backbone,
        *,
        in_features: Sequence[str] = (),
        padding_mask: str = "ceil",
        size_divisibility: int = 0,
    ) -> None:
        """Wrap a backbone.

        Args:
            body: any Detectron2 backbone.
            in_features: the outputs to use; empty for the one with the largest stride, of several
                the last one.
            padding_mask: rule of :func:`miti_detr.layers.feature_padding_mask`.
            size_divisibility: height and width of batches become multiples of it, in pixels; 0: no
                more padding than needed.

        Raises:
            ValueError: if the backbone has no such output.
        """
        super().__init__()
        shapes = body.output_shape()
        # Of several (res4 and res5 of DC5) the last one.
        coarsest = max(reversed(list(shapes)), key=lambda name: shapes[name].stride)
        self.in_features = tuple(in_features) or (coarsest,)
        if any(name not in shapes for name in self.in_features):
            raise ValueError(
                f"MODEL.DETR.IN_FEATURES is {list(in_features)}; use outputs of the backbone: "
                f"{list(shapes)}"
            )
        self.body = body
        self.size_divisibility = size_divisibility
        self.channels: dict[str, int] = {name: shapes[name].channels for name in self.in_features}
        self.strides: dict[str, int] = {name: shapes[name].stride for name in self.in_features}
        self.padding_mask = padding_mask
        whole = isinstance(body, ResNet) and coarsest in self.in_features
        self.has_idle_parts = len(shapes) > 1 and not whole

    def forward(self, images: ImageList) -> dict[str, Feature]:
        """Compute the features of a padded batch.

        Args:
            images: (N, 3, H, W) normalised, with the un-padded sizes.

        Returns:
            Name to feature, in the order of :attr:`in_features`.
        """
        if isinstance(images, KeptFeatures):
            outputs = images.features
        else:
            outputs = self.body(images.tensor.contiguous())
        return {
            name: Feature(outputs[name], self.mask_of(images, outputs[name], self.strides[name]))
            for name in self.in_features
        }

    def batch(self, images: Sequence[Tensor]) -> ImageList:
        """Pad normalised images (3, h, w) at the bottom and right to one size.

        Raises:
            ValueError: an image is larger than the backbone can take.
        """
        constraints = self.padding_constraints()
        square = constraints["square_size"]
        if square > 0 and square < (largest := max(max(image.shape[-2:]) for image in images)):
            raise ValueError(
                f"an image has a side of {largest} pixels, the backbone takes at most {square}: "
                "lower INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST"
            )
        return ImageList.from_tensors(list(images), padding_constraints=constraints)

    def mask_of(self, images: ImageList, feature: Tensor, stride: int) -> Tensor:
        """Padding mask (N, h, w) of a feature (N, C', h, w) with ``stride`` pixels per cell."""
        padded, grid = images.tensor.shape[-2:], feature.shape[-2:]
        sizes = images.image_sizes
        return feature_padding_mask(sizes, padded, grid, stride=stride, rule=self.padding_mask)

    def padding_constraints(self) -> dict[str, int]:
        """Return the constraints on the size of a batch, in pixels.

        Returns:
            ``size_divisibility`` and ``square_size`` (0: any shape), for
            :meth:`detectron2.structures.ImageList.from_tensors`.
        """
        asked = self.body.padding_constraints
        divisors = (
            self.size_divisibility,
            # Detectron2's SwinTransformer misspells what the property reads, hence the default;
            getattr(self.body, "size_divisibility", 0),
            asked.get("size_divisibility", 0),
            asked.get("size_divisiblity", 0),  # SimpleFeaturePyramid misspells the key
        )
        return {
            "size_divisibility": math.lcm(*(max(divisor, 1) for divisor in divisors)),
            "square_size": asked.get("square_size", 0),
        }
