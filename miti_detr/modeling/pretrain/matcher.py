"""Matching of patches with the queries that carry them.

L decoder layers, N images, Q queries, M patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miti_detr.modeling.matcher import HungarianMatcher
from miti_detr.modeling.targets import Target

FORBIDDEN = 1e5  # more than any cost


class OwnPatchMatcher(HungarianMatcher):
    """Matches each patch with one of its own queries.

    The published matching takes a query of any patch. As long as all predictions are alike, that is
    chance, and queries are told to look for patches that they do not carry.
    """

    def __init__(self, *, queries_per_patch: int, **weights: Any) -> None:
        """Take the number of queries of each patch, and the weights of the costs."""
        super().__init__(**weights)
        self.queries_per_patch = queries_per_patch

    def costs(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Tensor:
        """Costs (L, N, Q, M), prohibitive for the queries of other patches."""
        costs = super().costs(logits, boxes, targets)
        query, patch = (torch.arange(n, device=costs.device) for n in costs.shape[2:])
        other = query[:, None] // self.queries_per_patch != patch[None, :]
        return costs.masked_fill(other, FORBIDDEN)
