"""Attention with dropout of its weights, for CPUs.

What it computes: ``scaled_dot_product_attention`` with dropout. torch has no fused kernel for that
on a CPU: it keeps the attention weights before and after dropout for the backward pass. Here the
weights are computed again in the backward pass; what is kept is one byte for each weight. Dropout
draws its random numbers as in :mod:`miti_detr.accelerate.dropout`.

Where: on CPUs, in training with dropout, in eager mode. Without dropout torch's fused kernel is
used. The projections are those of :mod:`miti_detr.accelerate.linear`.

How exact: rounding; the random numbers differ from torch's.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from miti_detr.layers import MultiHeadAttention, attention_weights

from .dropout import can_draw, draw
from .exchange import exchange
from .kept import Kept
from .linear import PackedWeight, linear
from .prepared_weights import prepared


class FastAttention(MultiHeadAttention):
    """The attention of this package with faster projections and dropout."""

    _kept: dict[tuple[int, int], Kept[PackedWeight]]  # by the rows of the packed projection

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        learned_mask = mask is not None and mask.requires_grad
        if not self.training or not can_draw(q, self.dropout) or learned_mask:
            return super()._attend(q, k, v, mask)
        keep, scale = draw((*q.shape[:-1], k.shape[-2]), self.dropout)
        attended: Tensor = _DropoutAttention.apply(q, k, v, mask, keep, scale)
        return attended

    def _apply_rows(self, sources: list[Tensor], sizes: list[int]) -> list[Tensor]:
        if (weight_and_bias := prepared(self)) is not None:
            weight, bias = weight_and_bias
            assert bias is not None
            pieces = zip(sources, weight.split(sizes), bias.split(sizes), strict=False)
            return [F.linear(*each) for each in pieces]
        if torch.is_grad_enabled() and self.in_proj_weight.requires_grad:
            weights, biases = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
            pieces = zip(sources, weights, biases, strict=False)
            return [linear(x, weight, bias) for x, weight, bias in pieces]
        projected = []
        for x, size, stop in zip(sources, sizes, itertools.accumulate(sizes), strict=False):
            kept = self._kept.setdefault((stop - size, stop), Kept())
            rows = slice(stop - size, stop)
            projected.append(linear(x, self.in_proj_weight, self.in_proj_bias, rows, kept))
        return projected

    def _weights_to_prepare(self) -> tuple[Tensor, Tensor, None]:
        return self.in_proj_weight, self.in_proj_bias, None


def apply(model: nn.Module) -> int:
    """Exchange the attention modules below ``model``; return how many there were."""
    found = [module for module in model.modules() if type(module) is MultiHeadAttention]
    for module in found:
        exchange(module, FastAttention)
        module._kept = {}  # type: ignore[assignment]
    return len(found)


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
        """Attend.

        Args:
            ctx: of autograd.
            query: (N, heads, Lq, D).
            key: (N, heads, Lk, D).
            value: (N, heads, Lk, D).
            mask: as in :func:`~miti_detr.layers.attention_weights`, without gradient.
            keep: (N, heads, Lq, Lk) uint8.
            scale: factor for dropped weights.
        """
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
