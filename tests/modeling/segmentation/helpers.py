"""A small model with masks, and inputs for it."""

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks

from miti_detr.modeling.segmentation import SegmentationDetr
from tests.helpers import tiny_config, training_input

MASKS = ("MODEL.MASK_ON", True, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"])


def mask_config(*overrides: Any) -> CfgNode:
    return tiny_config(*MASKS, *overrides)


def mask_model(*overrides: Any, seed: int = 0) -> SegmentationDetr:
    """Its maps depend on the query more than at random weights, where all masks are much alike."""
    torch.manual_seed(seed)
    made = build_model(mask_config(*overrides))
    sharpen(made)
    return made


@torch.no_grad()
def sharpen(model: SegmentationDetr) -> None:
    """Let the masks depend more on the query."""
    model.bbox_attention.q_linear.weight.mul_(8)
    model.mask_head.lay1.weight[:, -model.bbox_attention.nheads :].mul_(64)


def mask_input(
    size: tuple[int, int], boxes: list[list[int]], classes: list[int], seed: int = 0
) -> dict[str, Any]:
    """As ``training_input``; the mask of an object is its box."""
    item = training_input(size, boxes, classes, seed)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    item["instances"].gt_masks = BitMasks(masks)
    return item
