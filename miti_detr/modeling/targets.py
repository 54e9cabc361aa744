"""Ground truth in the form that the set loss takes."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from detectron2.structures import Instances
from torch import Tensor

from miti_detr.layers import box_xyxy_to_cxcywh


class Target(TypedDict):
    """The objects of one image.

    ``labels`` is (T,) int64 in 0..K-1; ``boxes`` is (T, 4) ``cxcywh``, relative to the un-padded
    image. T may be 0.
    """

    labels: Tensor
    boxes: Tensor


def targets_from_instances(
    instances: Sequence[Instances], *, num_classes: int, device: torch.device, dtype: torch.dtype
) -> list[Target]:
    """Convert Detectron2's ground truth.

    Args:
        instances: one per image, with ``gt_boxes`` (pixels of the image that enters the network,
            whose un-padded size is ``image_size``) and ``gt_classes``.
        num_classes: K.
        device: where the targets are made.
        dtype: of the boxes.

    Raises:
        ValueError: if a class index is not in 0..K-1.
    """
    # All images at once, before anything is copied to the device.
    counts = [len(image) for image in instances]
    labels = torch.cat([image.gt_classes for image in instances])
    low, high = (int(bound) for bound in labels.aminmax()) if len(labels) else (0, 0)
    if not 0 <= low <= high < num_classes:
        raise ValueError(
            f"ground truth has class indices {low}..{high}, the model has classes "
            f"0..{num_classes - 1}: set MODEL.DETR.NUM_CLASSES to the data's"
        )
    corners = torch.cat([image.gt_boxes.tensor for image in instances]).to(dtype)
    sizes = torch.tensor([image.image_size[::-1] for image in instances])
    frames = sizes.repeat(1, 2).repeat_interleave(torch.tensor(counts), dim=0)
    boxes = box_xyxy_to_cxcywh(corners) / frames.to(corners)
    per_image = (x.to(device, non_blocking=True).split(counts) for x in (labels, boxes))
    return [Target(labels=c, boxes=b) for c, b in zip(*per_image, strict=True)]
