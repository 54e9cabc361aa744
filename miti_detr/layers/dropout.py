"""Dropout that is cheap on a CPU: in random numbers, and in what the backward pass has to keep."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_STEPS = 2**16  # a random number of 16 bits for each element: one of torch's of 64 bits serves four


def dropout(x: Tensor, p: float) -> Tensor:
    """Set elements to zero with probability ``p`` and scale the others by ``1 / (1 - p)``.

    On a CPU torch draws one random number after the other, which takes several times as long as the
    matrix products around it; here one draw serves four elements. ``p`` is rounded to 1/65536
    there. Elsewhere, and in compiled code, it is torch's own.

    Args:
        x: any shape.
        p: in [0, 1).
    """
    if not is_own(x):
        return F.dropout(x, p)
    keep, scale = draw(x.shape, p)
    return (x * keep).mul_(scale)


def relu_dropout(x: Tensor, p: float) -> Tensor:
    """``dropout(relu(x), p)``, of which the backward pass needs no more than the result.

    Args:
        x: any shape; may be overwritten.
        p: in [0, 1).
    """
    if p == 0 or not is_own(x):
        return F.dropout(F.relu(x, inplace=True), p)
    return _ReluDropout.apply(x, *draw(x.shape, p))


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements in training."""
        return dropout(x, self.p) if self.training and self.p > 0 else x


class ReluDropout(nn.Dropout):
    """ReLU, then dropout, by :func:`relu_dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Rectify, and drop elements in training; ``x`` may be overwritten."""
        return relu_dropout(x, self.p if self.training else 0.0)


class _ReluDropout(torch.autograd.Function):
    """Elements above 0 in the result are those that had a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        """Keep what is above 0 and drawn, scaled; all (...)."""
        y = (x * keep).clamp_min_(0.0).mul_(scale)
        ctx.save_for_backward(y)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The gradient where the result is above 0."""
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, y, 0).mul_(ctx.scale), None, None


def is_own(x: Tensor) -> bool:
    """Whether dropout is computed here, not by torch."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def draw(shape: Sequence[int], p: float) -> tuple[Tensor, float]:
    """Draw what to keep, uint8 of 0 and 1 on the CPU, and the factor that makes up for the rest.

    Args:
        shape: of the elements.
        p: the share to drop, in [0, 1).
    """
    zeros = round(p * _STEPS)
    return _at_least(zeros, shape), _STEPS / (_STEPS - zeros)


def _at_least(threshold: int, shape: Sequence[int]) -> Tensor:
    """1 where a random number in 0..65535 is at least ``threshold``, else 0; uint8, on the CPU.

    A product with it takes an eighth of the time of ``torch.where`` with bool, which is not made of
    vector instructions and guesses what comes next; and so is this comparison faster than one to
    bool.
    """
    count = math.prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[:count].view(shape)
    return torch.ge(draws, threshold - _STEPS // 2, out=torch.empty(shape, dtype=torch.uint8))
