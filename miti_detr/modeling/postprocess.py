"""From the raw prediction to Detectron2's ``Instances``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from miti_detr.layers import box_cxcywh_to_xyxy

from .classification import ClassScores, SoftmaxLoss


def boxes_in_pixels(boxes: Tensor, queries: Tensor, sizes: Tensor) -> Tensor:
    """Boxes of the detections of a batch; N images, D detections each.

    Args:
        boxes: (N, Q, 4) ``cxcywh``, relative to the un-padded images.
        queries: (N, D) int64, the query of each detection.
        sizes: (N, 2) height and width in pixels of the un-padded images.

    Returns:
        (N, D, 4) float32 ``xyxy`` in pixels, not clipped.
    """
    boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    return box_cxcywh_to_xyxy(boxes.float()) * sizes[:, [1, 0, 1, 0]][:, None]


def detections(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    read: Callable[[Tensor], ClassScores] = SoftmaxLoss.read,
) -> list[Instances]:
    """Read the detections; by default one from each query, its best class but "no object".

    No threshold and no suppression. N images, Q queries, K classes.

    Args:
        logits: (N, Q, K+1) of the last decoder layer, or what ``read`` takes.
        boxes: (N, Q, 4) ``cxcywh``, relative to the un-padded image.
        image_sizes: (height, width) in pixels of the un-padded images that entered the network.
        read: of the model's :class:`~miti_detr.modeling.classification.ClassLoss`.

    Returns:
        For each image ``pred_boxes`` (``xyxy`` pixels of that size, not clipped), ``scores`` and
        ``pred_classes``.

    Source: facebookresearch/detr ``d2/detr/detr.py`` at 29901c5.
    """
    # One by one: while a model is traced, each size is a tensor.
    sizes = torch.stack([torch.as_tensor(size, device=boxes.device) for size in image_sizes])
    scores, classes, queries = read(logits)
    corners = boxes_in_pixels(boxes, queries, sizes)
    return [  # indexed, since Detectron2 scales boxes in place, which views of unbind forbid
        Instances(tuple(size), pred_boxes=Boxes(corners[i]), scores=scores[i], pred_classes=labels)
        for i, (size, labels) in enumerate(zip(image_sizes, classes, strict=True))
    ]


def check_finite(results: Sequence[Instances], batched_inputs: Sequence[dict[str, Any]]) -> None:
    """Refuse detections that are not numbers, which Detectron2's post-processing only drops.

    Raises:
        ValueError: names the image, as the ``batched_inputs`` of Detectron2 do.
    """
    for result, inputs in zip(results, batched_inputs, strict=True):
        scores, boxes = result.scores, result.pred_boxes.tensor
        if not (torch.isfinite(scores).all() & torch.isfinite(boxes).all()):
            raise ValueError(
                f"the prediction for {inputs.get('file_name', 'an image')} is NaN or infinite. "
                "Check the image and the weights, and the precision if it is not float32."
            )
