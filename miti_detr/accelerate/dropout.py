"""Dropout with cheap random numbers, for CPUs.

What it computes: dropout, and ReLU followed by dropout, in training. torch draws one random number
of 64 bits for each element, one after the other, which takes several times as long as the matrix
products around it. Here one draw serves four elements. After a ReLU the backward pass needs no
more than the result.

Where: on CPUs, in training, in eager mode.

How exact: the probability is rounded to 1/65536; the random numbers differ from torch's.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .exchange import exchange, is_recorded

_STEPS = 2**16


class FastDropout(nn.Dropout):
    """``nn.Dropout`` with a quarter of its random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x``, in training."""
        if not self.training or not can_draw(x, self.p):
            return super().forward(x)
        keep, scale = draw(x.shape, self.p)
        return (x * keep).mul_(scale)


class FastReluDropout(nn.Sequential):
    """``nn.Sequential(nn.ReLU(), nn.Dropout(p))`` that keeps only its result."""

    def forward(self, x: Tensor) -> Tensor:
        """Rectify ``x``, then drop elements in training."""
        dropout = self[1]
        assert isinstance(dropout, nn.Dropout)
        p = dropout.p
        if not dropout.training or not can_draw(x, p) or _is_hooked(self):
            return super().forward(x)
        return _ReluDropout.apply(x, *draw(x.shape, p))


def apply(model: nn.Module) -> int:
    """Exchange the dropout modules below ``model``; return how many there were."""
    count = 0
    for module in model.modules():
        if type(module) is nn.Sequential and [type(part) for part in module] == [
            nn.ReLU,
            nn.Dropout,
        ]:
            exchange(module, FastReluDropout)
            count += 1
        elif type(module) is nn.Dropout:
            exchange(module, FastDropout)
            count += 1
    return count


class _ReluDropout(torch.autograd.Function):
    """Elements above 0 in the result are those that had a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        """Keep what is above 0 and drawn, scaled; all shapes (...)."""
        y = (x * keep).clamp_min_(0.0).mul_(scale)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Pass the gradient where the result is above 0."""
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, y, 0).mul_(ctx.scale), None, None


def can_draw(x: Tensor, p: float) -> bool:
    """Whether dropout of ``x`` is computed here instead of by torch."""
    return 0 < p < 1 and x.device.type == "cpu" and not is_recorded()


def draw(shape: Sequence[int], p: float) -> tuple[Tensor, float]:
    """Draw which elements are kept.

    Args:
        shape: of the elements.
        p: probability of dropping one, in (0, 1).

    Returns:
        uint8 of 0 and 1 on the CPU, and the factor that makes up for the dropped elements.
        ``torch.where`` on a bool mask is not vectorised; multiplying by a uint8 mask takes an
        eighth of the time.
    """
    zeros = min(round(p * _STEPS), _STEPS - 1)
    count = math.prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[:count].view(shape)
    keep = torch.ge(draws, zeros - _STEPS // 2, out=torch.empty(shape, dtype=torch.uint8))
    return keep, _STEPS / (_STEPS - zeros)


def _is_hooked(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.children())
