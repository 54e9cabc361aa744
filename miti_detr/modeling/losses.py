"""Box losses and diagnostics of a matched set prediction, for all decoder layers at once.

L decoder layers, N images, Q queries, K classes, M matches per layer.
Source: facebookresearch/detr ``models/detr.py`` at 29901c5.
"""

import torch
from torch import Tensor, nn

from miti_detr.layers import box_cxcywh_to_xyxy, generalized_box_iou


class BoxLoss(nn.Module):
    """L1 distance and generalised IoU of matched boxes."""

    def forward(
        self, predicted: Tensor, truth: Tensor, normalizer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute both.

        Args:
            predicted: (L, M, 4) ``cxcywh``.
            truth: (L, M, 4) ``cxcywh``.
            normalizer: scalar, published: the mean number of objects in a process' batch, at
                least 1.

        Returns:
            sum |b - b'|_1 / normalizer and sum (1 - GIoU) / normalizer, each (L,). Both are 0, and
            differentiable, if nothing is matched.
        """
        l1 = (predicted - truth).abs().sum((1, 2)) / normalizer
        giou = generalized_box_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(truth))
        return l1, (1 - giou).sum(1) / normalizer


@torch.no_grad()
def cardinality_errors(logits: Tensor, counts: Tensor) -> Tensor:
    """Mean over images of | predicted objects - objects |; a diagnostic.

    Args:
        logits: (L, N, Q, K+1).
        counts: (N,) objects of each image.

    Returns:
        (L,).
    """
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return (predicted - counts).abs().float().mean(-1)


@torch.no_grad()
def class_error(logits: Tensor, classes: Tensor) -> Tensor:
    """Percentage of matched queries whose best class is wrong; 100 if nothing is matched.

    Args:
        logits: (M, K+1) of the matched queries.
        classes: (M,) of their objects.
    """
    if not len(classes):
        return logits.new_tensor(100.0)
    return 100 - 100 * (logits.argmax(-1) == classes).float().mean()
