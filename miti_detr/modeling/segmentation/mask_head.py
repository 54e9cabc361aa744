"""From object queries to mask logits.

N images, Q queries, M pairs of an image and a query, C width, h x w cells of the encoded feature.
Source: DETR, section 4.4; facebookresearch/detr ``models/segmentation.py`` at 29901c5.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AttentionMap(nn.Module):
    """Where queries look in the encoded feature: attention weights without values.

    As published, the weights of a query sum to 1 over all heads and cells together:

    a[m, k] = exp(s[m, k]) / sum over heads m' and cells k' of exp(s[m', k'])
    s[m, k] = (W_q q)_m . (W_k x_k)_m / sqrt(C / heads)
    """

    def __init__(self, width: int, nheads: int) -> None:
        """Make the two projections.

        Args:
            width: C.
            nheads: divides C.
        """
        super().__init__()
        self.nheads = nheads
        self.q_linear = nn.Linear(width, width)
        self.k_linear = nn.Linear(width, width)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, states: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the maps of all queries.

        Args:
            states: decoder states (N, Q, C).
            memory: encoder output (N, C, h, w).
            mask: (N, h, w) bool, True = padding, which gets weight 0; None: no padding.

        Returns:
            (N, Q, heads, h, w).
        """
        query = self.q_linear(states).unflatten(-1, (self.nheads, -1))
        key = self.k_linear(memory.flatten(2).transpose(1, 2)).unflatten(-1, (self.nheads, -1))
        scores = torch.einsum("nqmc,nkmc->nqmk", query / math.sqrt(query.shape[-1]), key)
        if mask is not None:
            scores = scores.masked_fill(mask.flatten(1)[:, None, None], -math.inf)
        return scores.flatten(2).softmax(-1).unflatten(-1, (self.nheads, *memory.shape[-2:]))


class MaskHead(nn.Module):
    """Refines attention maps to masks, with finer and finer features of the backbone.

    Each pair of an image and a query has its own input: the feature of the image beside the
    maps of the query. Two 3x3 convolutions are followed by one for each level of the pyramid,
    where the previous result is enlarged and added to the projected feature.
    """

    def __init__(self, width: int, nheads: int, pyramid: Sequence[int]) -> None:
        """Make the layers, under their published names.

        Args:
            width: C.
            nheads: maps of each query.
            pyramid: channels of the features, the coarsest first; three as published.

        Raises:
            ValueError: C is too small to be halved so often.
        """
        super().__init__()
        outputs = [width + nheads, *(width // 2**k for k in range(1, len(pyramid) + 2))]
        if outputs[-1] < 1:
            raise ValueError(
                f"MODEL.DETR.HIDDEN_DIM is {width}; masks need at least {2 ** (len(pyramid) + 1)}"
            )
        self.num_levels = len(pyramid)
        widths = itertools.pairwise(outputs[:1] + outputs)
        for index, (before, after) in enumerate(widths, start=1):
            self.add_module(f"lay{index}", nn.Conv2d(before, after, 3, padding=1))
            # 8 groups as published, or as many as a small width allows
            self.add_module(f"gn{index}", nn.GroupNorm(math.gcd(8, after), after))
        self.out_lay = nn.Conv2d(outputs[-1], 1, 3, padding=1)
        for index, channels in enumerate(pyramid, start=1):
            self.add_module(f"adapter{index}", nn.Conv2d(channels, outputs[index], 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(
        self, source: Tensor, maps: Tensor, pyramid: Sequence[Tensor], image: Tensor
    ) -> Tensor:
        """Compute the masks of M pairs.

        Args:
            source: projected feature (N, C, h, w), not yet encoded.
            maps: attention maps (M, heads, h, w).
            pyramid: features (N, C', h', w'), the coarsest first.
            image: (M,) int64, the image of each pair.

        Returns:
            Logits (M, h', w') on the grid of the last feature.
        """
        x = self._normalise(1, self._first(source, maps, image))
        x = self._normalise(2, self.get_submodule("lay2")(x))
        for level, feature in enumerate(pyramid, start=1):
            adapted = self.get_submodule(f"adapter{level}")(feature)[image]
            x = adapted + F.interpolate(x, size=adapted.shape[-2:], mode="nearest")
            x = self._normalise(level + 2, self.get_submodule(f"lay{level + 2}")(x))
        return self.out_lay(x)[:, 0]

    def _first(self, source: Tensor, maps: Tensor, image: Tensor) -> Tensor:
        """``lay1`` on the feature beside the maps; the share of the feature once for each image."""
        layer = self.get_submodule("lay1")
        assert isinstance(layer, nn.Conv2d)
        of_source, of_maps = layer.weight.split([source.shape[1], maps.shape[1]], dim=1)
        shared = F.conv2d(source, of_source, padding=1)
        return shared[image] + F.conv2d(maps, of_maps, layer.bias, padding=1)

    def _normalise(self, index: int, x: Tensor) -> Tensor:
        return F.relu(self.get_submodule(f"gn{index}")(x))
