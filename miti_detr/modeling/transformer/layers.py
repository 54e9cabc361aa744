"""Encoder and decoder layer of DETR, with the layer residual.

N images, n tokens of the feature grid, Q object queries, C width. Position terms are added to
queries and keys of attention in every layer, never to values.
State-dict keys are those of facebookresearch/detr ``models/transformer.py`` at 29901c5.
"""

from typing import Any

from torch import Tensor, nn

from miti_detr.layers import MultiHeadAttention

from .residual import LayerResidual


class TransformerLayer(nn.Module):
    """What both layers share: self-attention, feed-forward network, norm order, layer residual."""

    def __init__(
        self,
        *,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        layer_residual: str,
        self_attn: nn.Module | None = None,
    ) -> None:
        """Make the shared parts; arguments as in :class:`ResidualTransformer`.

        ``self_attn`` takes the place of :class:`MultiHeadAttention`.
        """
        super().__init__()
        self.self_attn = self_attn or MultiHeadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.activation = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        self.residual = LayerResidual(layer_residual)

    def _self_attention(self, x: Tensor, pos: Tensor | None, mask: Tensor | None) -> Tensor:
        query = _add(x, pos)
        return self.dropout(self.self_attn(query, query, x, mask))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.activation(self.linear1(x))))


class EncoderLayer(TransformerLayer):
    """Self-attention among the tokens of an image, then the feed-forward network."""

    def forward(self, x: Tensor, pos: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: tokens (N, n, C).
            pos: position encoding (N, n, C), or none.
            mask: for attention among tokens, broadcastable to (N, heads, n, n), True = may attend.

        Returns:
            (N, n, C).
        """
        if self.pre_norm:
            z = self.norm1(x)
            y = x + self._self_attention(z, pos, mask)
            return self.residual.finish_pre_norm(x, z, y + self._feed_forward(self.norm2(y)))
        y = self.norm1(x + self._self_attention(x, pos, mask))
        return self.residual.finish_post_norm(x, y + self._feed_forward(y), self.norm2)


class DecoderLayer(TransformerLayer):
    """Self-attention among the queries, cross-attention to the tokens, feed-forward network."""

    def __init__(self, *, d_model: int, nhead: int, dropout: float, **shared: Any) -> None:
        """Make the layer; arguments as in :class:`TransformerLayer`."""
        super().__init__(d_model=d_model, nhead=nhead, dropout=dropout, **shared)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, dropout=dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        query_pos: Tensor | None = None,
        memory_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: query states (N, Q, C).
            memory: encoder output (N, n, C), the values of cross-attention.
            memory_key: memory plus its position encoding (N, n, C), the keys.
            query_pos: query embeddings (N, Q, C), or none.
            memory_mask: broadcastable to (N, heads, Q, n), True = may attend.
            query_mask: for attention among queries, broadcastable to (N, heads, Q, Q): bool with
                True = may attend, or float, added to the logits.

        Returns:
            (N, Q, C).
        """
        if self.pre_norm:
            z = self.norm1(x)
            y = x + self._self_attention(z, query_pos, query_mask)
            c = y + self._cross_attention(self.norm2(y), query_pos, memory_key, memory, memory_mask)
            return self.residual.finish_pre_norm(x, z, c + self._feed_forward(self.norm3(c)))
        y = self.norm1(x + self._self_attention(x, query_pos, query_mask))
        c = self.norm2(y + self._cross_attention(y, query_pos, memory_key, memory, memory_mask))
        return self.residual.finish_post_norm(x, c + self._feed_forward(c), self.norm3)

    def _cross_attention(
        self, x: Tensor, pos: Tensor | None, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        return self.dropout(self.multihead_attn(_add(x, pos), key, value, mask))


def _add(x: Tensor, pos: Tensor | None) -> Tensor:
    return x if pos is None else x + pos
