"""Detectron2's ResNet as DETR needs it, of any width."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock

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
