"""Multi-head attention with the parameters of ``torch.nn.MultiheadAttention``, batch first."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention by ``scaled_dot_product_attention``.

    State-dict keys and initialisation are those of ``torch.nn.MultiheadAttention`` (one packed
    (3C, C) input projection), so that published checkpoints fit and start alike.
    """

    def __init__(self, d_model: int, nhead: int, *, dropout: float = 0.0) -> None:
        """Make attention of width C = ``d_model``.

        Raises:
            ValueError: if ``nhead`` does not divide ``d_model``.
        """
        super().__init__()
        if nhead < 1 or d_model < 1 or d_model % nhead:
            raise ValueError(
                f"MODEL.DETR.HIDDEN_DIM {d_model} is not divisible by MODEL.DETR.NHEADS {nhead}"
            )
        self.nhead = nhead
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d_model, d_model))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d_model))
        self.out_proj = nn.Linear(d_model, d_model)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Compute attention.

        Args:
            query: (N, Lq, C).
            key: (N, Lk, C); passing the same object as ``query`` saves a product.
            value: (N, Lk, C).
            mask: broadcastable to (N, heads, Lq, Lk): bool with **True = may attend**, or float,
                added to the logits.

        Returns:
            (N, Lq, C).
        """
        q, k, v = self._project(query, key, value)
        attended = self._attend(q, k, v, mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention weights for the arguments of :meth:`forward`, without dropout.

        Returns:
            (N, heads, Lq, Lk); each row sums to 1.
        """
        q, k = self._project(query, key)
        return attention_weights(q, k, mask)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention per head, (N, heads, L, C / heads) each."""
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)

    def _project(self, query: Tensor, key: Tensor, *value: Tensor) -> list[Tensor]:
        """Apply the packed projection and split the heads: (N, heads, L, C / heads) each."""
        width = self.out_proj.in_features
        if query is key:
            both, *rest = self._apply_rows([query, *value], [2 * width, width])
            projected = [*both.chunk(2, dim=-1), *rest]
        else:
            projected = self._apply_rows([query, key, *value], [width] * 3)
        return [x.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for x in projected]

    def _apply_rows(self, sources: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Apply ``sizes[i]`` rows of the packed projection, one after the other, to input i."""
        weights, biases = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
        return [F.linear(*each) for each in zip(sources, weights, biases, strict=False)]


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax of scaled dot products.

    Args:
        query: (N, heads, Lq, D).
        key: (N, heads, Lk, D).
        mask: broadcastable to (N, heads, Lq, Lk): bool with **True = may attend**, or float,
            added to the logits.

    Returns:
        (N, heads, Lq, Lk); each row sums to 1.
    """
    logits = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(dim=-1)
