"""Backbones: any of Detectron2's, with padding masks beside the feature; ResNets of any width.

N images, H x W padded batch in pixels, h x w feature grid.
"""

import math
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from detectron2.structures import ImageList
from torch import Tensor, nn

from miti_detr.layers import PADDING_MASK_RULES, feature_padding_mask
from miti_detr.modeling.folding import fold_frozen_batch_norm
from miti_detr.modeling.residual_blocks import fuse_residual_blocks


class MaskedBackbone(nn.Module):
    """A Detectron2 backbone that also tells which cells of its feature are padding.

    Attributes:
        body: the backbone.
        in_feature: name of its output that is used.
        num_channels: channels of that output.
        stride: pixels per cell of that output.
        has_idle_parts: it may have parameters that this output does not need.
    """

    def __init__(
        self,
        body: Backbone,
        *,
        in_features: Sequence[str] = (),
        padding_mask: str = "ceil",
        fast_conv: bool = True,
    ) -> None:
        """Wrap a backbone.

        Args:
            body: any Detectron2 backbone.
            in_features: the one output to use; empty for the one with the largest stride, of
                several the last one.
            padding_mask: rule of :func:`miti_detr.layers.feature_padding_mask`.
            fast_conv: channels_last layout, and convolutions that do the frozen batch norm, ReLU
                and addition behind them: the same numbers but for rounding, faster and with less
                memory.

        Raises:
            ValueError: if the backbone has no such output, or the rule is unknown.
        """
        super().__init__()
        shapes = body.output_shape()
        # Of several (res4 and res5 of DC5) the last one.
        coarsest = max(reversed(list(shapes)), key=lambda name: shapes[name].stride)
        chosen = list(in_features) or [coarsest]
        if len(chosen) != 1 or chosen[0] not in shapes:
            raise ValueError(
                f"MODEL.DETR.IN_FEATURES is {chosen}; give one of the backbone's outputs: "
                f"{list(shapes)}"
            )
        if padding_mask not in PADDING_MASK_RULES:
            raise ValueError(
                f"MODEL.DETR.PADDING_MASK is {padding_mask!r}; use one of {PADDING_MASK_RULES}"
            )
        self.body = body
        self.fast_conv = fast_conv
        if fast_conv:
            fold_frozen_batch_norm(body)
            fuse_residual_blocks(body)
            # Kernels as well, or every step would copy them, and their gradients back.
            body.to(memory_format=torch.channels_last)
        self.in_feature = chosen[0]
        self.num_channels: int = shapes[self.in_feature].channels
        self.stride: int = shapes[self.in_feature].stride
        self.padding_mask = padding_mask
        whole = isinstance(body, ResNet) and self.in_feature == coarsest
        self.has_idle_parts = len(shapes) > 1 and not whole

    def forward(self, images: ImageList) -> tuple[Tensor, Tensor]:
        """Compute the feature of a padded batch.

        Args:
            images: (N, 3, H, W) normalised, with the un-padded sizes.

        Returns:
            Feature (N, num_channels, h, w), and padding mask (N, h, w), True = padding. The mask is
            on the host, which then need not wait for the device to learn whether there is padding.
        """
        tensor = images.tensor
        if self.fast_conv:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        feature = self.body(tensor)[self.in_feature]
        mask = feature_padding_mask(
            images.image_sizes,
            images.tensor.shape[-2:],
            feature.shape[-2:],
            stride=self.stride,
            rule=self.padding_mask,
        )
        return feature, mask

    def padding_constraints(self, multiple: int = 1) -> dict[str, int]:
        """What the backbone needs of the size of a batch, in pixels.

        Args:
            multiple: a further divisor of height and width.

        Returns:
            ``size_divisibility`` and ``square_size`` (0: any shape), for
            :meth:`detectron2.structures.ImageList.from_tensors`.
        """
        asked = self.body.padding_constraints
        divisors = (
            multiple,
            # Misspelled behind the property in Detectron2's SwinTransformer, hence the default,
            getattr(self.body, "size_divisibility", 0),
            asked.get("size_divisibility", 0),
            asked.get("size_divisiblity", 0),  # and so in its SimpleFeaturePyramid.
        )
        return {
            "size_divisibility": math.lcm(*(max(divisor, 1) for divisor in divisors)),
            "square_size": asked.get("square_size", 0),
        }

    def extra_repr(self) -> str:
        """Show what is used in the printed model."""
        return f"in_feature={self.in_feature}, padding_mask={self.padding_mask}"


NUM_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


@BACKBONE_REGISTRY.register()
def build_detr_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet as DETR needs it, from the keys ``MODEL.RESNETS.*``.

    It differs from ``build_resnet_backbone`` in two points: with ``RES5_DILATION: 2`` the blocks
    of res5 have the dilations (1, 2, 2) that the published DC5 weights were trained with
    (Detectron2's own are (2, 2, 2)), and ``RES2_OUT_CHANNELS`` is free in networks of basic
    blocks, for small models.

    Raises:
        ValueError: for a depth or dilation that it does not know.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in NUM_BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; use one of {list(NUM_BLOCKS)}")
    if resnets.RES5_DILATION not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION is {resnets.RES5_DILATION}; use 1 or 2")
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    stages = []
    in_channels = resnets.STEM_OUT_CHANNELS
    for index, num_blocks in enumerate(NUM_BLOCKS[resnets.DEPTH]):
        out_channels = resnets.RES2_OUT_CHANNELS * 2**index
        dilated = index == 3 and resnets.RES5_DILATION == 2
        first_stride = 1 if index == 0 or dilated else 2
        block: dict[str, object] = {"block_class": BasicBlock}
        if resnets.DEPTH >= 50:
            block = {
                "block_class": BottleneckBlock,
                "bottleneck_channels": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**index,
                "num_groups": resnets.NUM_GROUPS,
                "stride_in_1x1": resnets.STRIDE_IN_1X1,
                "dilation_per_block": [1] + [2 if dilated else 1] * (num_blocks - 1),
            }
        elif dilated:
            raise ValueError("MODEL.RESNETS.RES5_DILATION 2 needs MODEL.RESNETS.DEPTH 50 or more")
        stages.append(
            ResNet.make_stage(
                num_blocks=num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=in_channels,
                out_channels=out_channels,
                norm=resnets.NORM,
                **block,
            )
        )
        in_channels = out_channels
    return ResNet(
        stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT
    )
