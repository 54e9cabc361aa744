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
    targets: list[Target] = []
    for image in instances:
        labels = image.gt_classes
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"ground truth has class indices {int(labels.min())}..{int(labels.max())}, the "
                f"model has classes 0..{num_classes - 1}: set MODEL.DETR.NUM_CLASSES to the data's"
            )
        height, width = image.image_size
        boxes = image.gt_boxes.tensor.to(device, dtype)
        boxes = box_xyxy_to_cxcywh(boxes) / boxes.new_tensor([width, height, width, height])
        targets.append({"labels": labels.to(device), "boxes": boxes})
    return targets
