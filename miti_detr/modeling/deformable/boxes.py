"""Boxes relative to references, and the boxes that the encoder proposes.

N images, S tokens, Q object queries, C width. Boxes are ``cxcywh`` in [0, 1] of the un-padded
image.
Source: fundamentalvision/Deformable-DETR ``models/deformable_transformer.py`` and
``models/deformable_detr.py`` at 11169a6.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miti_detr.layers import at_least_float32

from .pyramid import Pyramid

PROPOSAL_SIDE = 0.05  # of the first level, doubled by each further one


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logit of values in [0, 1], which stay finite: 0 and 1 count as 1e-5 away from the border."""
    return x.clamp(min=1e-5).log() - (1 - x).clamp(min=1e-5).log()


def refine_boxes(states: Tensor, references: Tensor, bbox_embed: nn.Module) -> Tensor:
    """Apply a box head, whose output is a change of the reference in logit space.

    Args:
        states: (..., C).
        references: (..., 2) points, which leave width and height to the head, or (..., 4) boxes.
        bbox_embed: the head.

    Returns:
        Boxes (..., 4) in float32 or better.
    """
    change = at_least_float32(bbox_embed(states))
    anchor = F.pad(inverse_sigmoid(references), (0, 4 - references.shape[-1]))
    return (change + anchor).sigmoid()


def token_boxes(pyramid: Pyramid) -> tuple[Tensor, Tensor]:
    """The box that each token starts from: its place, and a size that its level decides.

    Returns:
        Logits of the boxes (N, S, 4), infinite where there is none, and (N, S) bool, True where
        there is one: neither in the padding nor at the border.
    """
    centres = pyramid.cell_centres()
    sides = [PROPOSAL_SIDE * 2.0**level for level in range(len(pyramid.shapes))]
    size = pyramid.per_level(centres.new_tensor(sides)[:, None]).expand(*centres.shape[:2], 2)
    boxes = torch.cat([centres, size], dim=-1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if pyramid.mask is not None:
        valid = valid & ~pyramid.mask
    logits = (boxes / (1 - boxes)).log()
    return logits.masked_fill(~valid[..., None], torch.inf), valid


def embed_boxes(boxes: Tensor, d_model: int) -> Tensor:
    """Sines and cosines of boxes (N, Q, 4): (N, Q, 2 C), C / 2 for each coordinate."""
    count = d_model // 2
    exponent = torch.arange(0, count, 2, device=boxes.device, dtype=torch.float32) / count
    angle = boxes[..., None] * (2 * math.pi) / 10000.0**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(2)
