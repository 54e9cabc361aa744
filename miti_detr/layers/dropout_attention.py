"""Attention with dropout of its weights, for which torch has no fused kernel on a CPU.

N images, Lq queries, Lk keys, D channels of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from .dropout import draw, dropout, is_own


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention weights, without dropout.

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


def dropout_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float
) -> Tensor:
    """Attend with dropout of the weights; on a CPU these are made again in the backward pass.

    What is kept for it is a byte for each weight, dropped or not.

    Args:
        query: (N, heads, Lq, D).
        key: (N, heads, Lk, D).
        value: (N, heads, Lk, D).
        mask: of :func:`attention_weights`.
        p: in [0, 1).

    Returns:
        (N, heads, Lq, D), in the precision of ``value``.
    """
    if not is_own(query) or (mask is not None and mask.requires_grad):
        weights = attention_weights(query, key, mask).to(value.dtype)
        return dropout(weights, p) @ value
    keep, scale = draw((*query.shape[:-1], key.shape[-2]), p)
    attended: Tensor = _DropoutAttention.apply(query, key, value, mask, keep, scale)
    return attended


class _DropoutAttention(torch.autograd.Function):
    """Scales values and gradients, which are smaller than the weights."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        keep: Tensor,
        scale: float,
    ) -> Tensor:
        """Attend; shapes as in :func:`dropout_attention`, ``keep`` (N, heads, Lq, Lk)."""
        ctx.save_for_backward(query, key, value, mask, keep)
        ctx.scale = scale
        weights = attention_weights(query, key, mask).to(value.dtype)
        return weights.mul_(keep) @ (value * scale)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of query, key and value."""
        query, key, value, mask, keep = ctx.saved_tensors
        gradient = gradient * ctx.scale
        weights = attention_weights(query, key, mask)
        for_weights = (gradient @ value.transpose(-2, -1)).mul_(keep).to(weights.dtype)
        for_logits = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        for_value = weights.to(value.dtype).mul_(keep).transpose(-2, -1) @ gradient
        for_logits = for_logits.to(query.dtype).div_(math.sqrt(query.shape[-1]))
        for_query = for_logits @ key
        for_key = for_logits.transpose(-2, -1) @ query
        return for_query, for_key, for_value, None, None, None
