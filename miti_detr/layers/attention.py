"""Multi-head attention with the parameters of ``torch.nn.MultiheadAttention``, batch first."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .derived import Derived
from .dropout_attention import attention_weights, dropout_attention
from .linear import Linear, linear


class MultiHeadAttention(nn.Module):
    """Multi-head attention by ``scaled_dot_product_attention``; no attention weights are kept.

    State-dict keys and initialisation are those of ``torch.nn.MultiheadAttention`` (one packed
    (3C, C) input projection), so that published checkpoints fit and start alike.
    """

    def __init__(self, d_model: int, nhead: int, *, dropout: float = 0.0) -> None:
        """Make attention of width C = ``d_model``.

        Raises:
            ValueError: if ``nhead`` does not divide ``d_model``.
        """
        super().__init__()
        if d_model % nhead:
            raise ValueError(f"width {d_model} is not divisible by {nhead} attention heads")
        self.nhead = nhead
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = Linear(d_model, d_model)
        self._kept: dict[tuple[int, int], Derived[tuple[Tensor, Tensor | None]]]
        self._kept = {part: Derived() for part in ((0, 1), (0, 2), (1, 2), (2, 3))}
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: (N, Lq, C).
            key: (N, Lk, C); the same object as ``query`` in self-attention saves a product.
            value: (N, Lk, C).
            mask: broadcastable to (N, heads, Lq, Lk): bool with **True = may attend**, or float,
                added to the logits.

        Returns:
            (N, Lq, C).
        """
        v = self._split_heads(self._project(value, 2, 3))
        p = self.dropout if self.training else 0.0
        q, k = map(self._split_heads, self._project_query_key(query, key))
        if p > 0 and query.device.type == "cpu":
            attended = dropout_attention(q, k, v, mask, p)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights for arguments of :meth:`forward`, computed anew and without dropout.

        Returns:
            (N, heads, Lq, Lk); each row sums to 1.
        """
        q, k = map(self._split_heads, self._project_query_key(query, key))
        return attention_weights(q, k, mask)

    def _project_query_key(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if query is key:
            q, k = self._project(query, 0, 2).chunk(2, dim=-1)
            return q, k
        return self._project(query, 0, 1), self._project(key, 1, 2)

    def _project(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Apply parts of the packed projection, of 0: query, 1: key, 2: value."""
        d_model = self.out_proj.in_features
        rows = slice(start * d_model, stop * d_model)
        kept = self._kept[start, stop]
        return linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows], kept=kept)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.nhead, -1)).transpose(1, 2)  # (N, heads, L, C / heads)
