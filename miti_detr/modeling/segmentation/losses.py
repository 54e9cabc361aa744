"""Losses of the masks of matched queries.

M matches, H x W padded batch in pixels, h' x w' grid of the mask logits.
"""

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
    point_sample,
)
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

OVERSAMPLING = 3  # candidates for each point, of which the least certain ones are taken
IMPORTANCE = 0.75  # share of the points that are taken so; the others are random


def mask_losses(logits: Tensor, truth: Tensor, normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """Focal loss and dice loss.

    focal = sum over masks of the mean over pixels of -a_t (1 - p_t)^2 log p_t, a_1 = 1/4
    dice = sum over masks of 1 - (2 sum p t + 1) / (sum p + sum t + 1)

    Args:
        logits: (M, pixels) or (M, points).
        truth: the same shape, in [0, 1].
        normalizer: scalar, the mean number of objects in a process' batch, at least 1.

    Returns:
        Both sums divided by the normaliser. They are 0, and differentiable, if M is 0.

    Source: facebookresearch/detr ``models/segmentation.py`` at 29901c5.
    """
    focal = sigmoid_focal_loss(logits, truth, alpha=0.25, gamma=2)
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum(1)
    dice = 1 - (overlap + 1) / (probability.sum(1) + truth.sum(1) + 1)
    return focal.mean(1).sum() / normalizer, dice.sum() / normalizer


def at_pixels(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and truth at all pixels of the padded batch, padding included, as published.

    Args:
        logits: (M, h', w').
        truth: (M, H, W) bool.

    Returns:
        (M, H W) each.
    """
    enlarged = F.interpolate(logits[:, None], size=truth.shape[-2:], mode="bilinear")
    return enlarged.flatten(1), truth.flatten(1).to(logits.dtype)


def at_points(logits: Tensor, truth: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Logits and truth at points, most of them where the mask is least certain.

    Args:
        logits: (M, h', w').
        truth: (M, H, W) bool.
        count: points of each mask.

    Returns:
        (M, count) each.

    Source: PointRend (Kirillov et al., 2020), section 3.2; Mask2Former, section 3.3.
    """
    if not len(logits):
        return at_pixels(logits, truth)
    with torch.no_grad():
        points = get_uncertain_point_coords_with_randomness(
            logits[:, None].float(), lambda x: -x.abs(), count, OVERSAMPLING, IMPORTANCE
        ).to(logits.dtype)
    found, wanted = (
        point_sample(x[:, None], points, align_corners=False, padding_mode="border")[:, 0]
        for x in (logits, truth.to(logits.dtype))
    )
    return found, wanted
