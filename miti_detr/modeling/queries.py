"""What the decoder is asked: object queries.

N images, Q queries, C width.
"""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ObjectQueries:
    """Input of the decoder.

    Attributes:
        embed: (Q, C), or (N, Q, C) where each image has its own.
        mask: for attention among queries, broadcastable to (N, heads, Q, Q), True = may attend;
            None: all attend to all.
    """

    embed: Tensor
    mask: Tensor | None = None
