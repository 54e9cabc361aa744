"""Box formats and generalised IoU.

Formats: ``cxcywh`` is (centre x, centre y, width, height), ``xyxy`` is (x0, y0, x1, y1). Any unit.
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from ``cxcywh`` to ``xyxy``, in the same unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes (..., 4) from ``xyxy`` to ``cxcywh``, in the same unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of boxes, element by element after broadcasting.

    GIoU = IoU - (|hull| - |union|) / |hull|, in [-1, 1]. For all pairs call it with
    ``boxes1[:, None]`` and ``boxes2[None]``. Boxes without area are legal: a division by zero gives
    0, never NaN.

    Args:
        boxes1: (..., 4) ``xyxy``.
        boxes2: (..., 4) ``xyxy``, broadcastable with ``boxes1``.

    Returns:
        (...) in the broadcast shape.

    Source: Rezatofighi et al., Generalized Intersection over Union, 2019.
    """
    # One coordinate at a time: for all pairs, the innermost axis is then long enough to be fast.
    left1, top1, right1, bottom1 = boxes1.unbind(-1)
    left2, top2, right2, bottom2 = boxes2.unbind(-1)
    overlap_x = (right1.minimum(right2) - left1.maximum(left2)).clamp(min=0)
    overlap_y = (bottom1.minimum(bottom2) - top1.maximum(top2)).clamp(min=0)
    hull_x = (right1.maximum(right2) - left1.minimum(left2)).clamp(min=0)
    hull_y = (bottom1.maximum(bottom2) - top1.minimum(top2)).clamp(min=0)
    intersection = overlap_x * overlap_y
    hull = hull_x * hull_y
    area1, area2 = (right1 - left1) * (bottom1 - top1), (right2 - left2) * (bottom2 - top2)
    union = area1 + area2 - intersection
    tiny = 1e-30  # far below the area of any box that a network can predict
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
