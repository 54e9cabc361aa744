"""The set prediction and the heads that compute it.

L decoder layers, N images, Q queries, C width, K classes.
"""

import dataclasses

from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class SetPrediction:
    """Raw output of every decoder layer, in order. Subclasses extend it.

    Attributes:
        logits: (L, N, Q, K+1); index K is "no object". With focal loss (L, N, Q, K).
        boxes: (L, N, Q, 4) ``cxcywh`` in [0, 1] of the un-padded image.
    """

    logits: Tensor
    boxes: Tensor


def predict_set(states: Tensor, class_embed: nn.Module, bbox_embed: nn.Module) -> SetPrediction:
    """Apply the heads, which all decoder layers share, to decoder states (L, N, Q, C)."""
    # Boxes leave half precision before the sigmoid, whose steps near 1 would be 1/256 in bfloat16.
    box_logits = bbox_embed(states)
    if box_logits.element_size() < 4:
        box_logits = box_logits.float()
    return SetPrediction(class_embed(states), box_logits.sigmoid())
