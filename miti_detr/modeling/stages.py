"""Data that the stages of the model pass to each other.

N images, h x w feature grid, Q object queries, L decoder layers, C width, K classes.
"""

import dataclasses

from torch import Tensor

from .backbones.masked_backbone import Feature


@dataclasses.dataclass(frozen=True)
class ObjectQueries:
    """Input of the decoder.

    Attributes:
        embed: (Q, C), or (N, Q, C) where each image has its own; None: the transformer makes them.
        mask: for attention among queries, broadcastable to (N, heads, Q, Q), True = may attend;
            None: all attend to all.
    """

    embed: Tensor | None
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A batch of images as the transformer takes it.

    Attributes:
        features: outputs of the backbone by name.
        source: projected feature (N, C, h, w).
        mask: (N, h, w) bool, True = padding; None if nothing is padded.
        position: position encoding (N, C, h, w).
    """

    features: dict[str, Feature]
    source: Tensor
    mask: Tensor | None
    position: Tensor


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Output of the transformer.

    Attributes:
        states: decoder states (L, N, Q, C), each after the final norm.
        memory: encoder output (N, C, h, w).
        queries: the queries that were decoded.
    """

    states: Tensor
    memory: Tensor
    queries: ObjectQueries

    def last(self) -> "Decoded":
        """The last decoder layer only, L = 1."""
        return dataclasses.replace(self, states=self.states[-1:])


@dataclasses.dataclass(frozen=True)
class SetPrediction:
    """Raw output of every decoder layer, in order. Subclasses extend it.

    Attributes:
        logits: (L, N, Q, K+1); index K is "no object". With focal loss (L, N, Q, K).
        boxes: (L, N, Q, 4) ``cxcywh`` in [0, 1] of the un-padded image.
    """

    logits: Tensor
    boxes: Tensor
