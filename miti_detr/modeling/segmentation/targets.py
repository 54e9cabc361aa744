"""Ground truth masks in the form that the losses take."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import Tensor


def padded_masks(
    instances: Sequence[Instances], size: tuple[int, int], device: torch.device
) -> Tensor:
    """Masks of all objects of a batch, in the frame of the padded batch.

    Args:
        instances: one per image, with ``gt_masks``: ``PolygonMasks`` or ``BitMasks`` in pixels of
            the image that enters the network.
        size: height and width of the padded batch.
        device: where the result is made.

    Returns:
        (T, *size) bool, the objects of the first image first.

    Raises:
        ValueError: an image has no masks, or of another size than its own.
    """
    return torch.cat([_padded(image, size, device) for image in instances])


def _padded(image: Instances, size: tuple[int, int], device: torch.device) -> Tensor:
    if not image.has("gt_masks"):
        if len(image) == 0:
            return torch.zeros(0, *size, dtype=torch.bool, device=device)
        raise ValueError(
            "training inputs need 'gt_masks' beside 'gt_boxes': set MODEL.MASK_ON True where the "
            "data are mapped, or False here"
        )
    masks: Any = image.gt_masks
    height, width = image.image_size
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, height, width)
    tensor: Tensor = masks.tensor.to(device)
    if tuple(tensor.shape[1:]) != (height, width):
        raise ValueError(
            f"'gt_masks' have {tuple(tensor.shape[1:])} pixels in an image of {(height, width)}: "
            "transform them with the image"
        )
    return F.pad(tensor, (0, size[1] - width, 0, size[0] - height))
