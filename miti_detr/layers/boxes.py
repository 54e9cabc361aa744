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
    low1, high1 = boxes1[..., :2], boxes1[..., 2:]
    low2, high2 = boxes2[..., :2], boxes2[..., 2:]
    overlap = (high1.minimum(high2) - low1.maximum(low2)).clamp(min=0)
    hull = (high1.maximum(high2) - low1.minimum(low2)).clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    hull_area = hull[..., 0] * hull[..., 1]
    union = _area(boxes1) + _area(boxes2) - intersection
    tiny = 1e-30  # far below the area of any box that a network can predict
    return intersection / union.clamp(min=tiny) - (hull_area - union) / hull_area.clamp(min=tiny)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
