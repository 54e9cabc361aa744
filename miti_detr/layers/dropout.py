"""Dropout whose random numbers are cheap on a CPU."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    zeros = round(p * _STEPS)
    return torch.where(_at_least(zeros, x.shape), x * (_STEPS / (_STEPS - zeros)), 0.0)


def _at_least(threshold: int, shape: Sequence[int]) -> Tensor:
    """Whether a random number in 0..65535 is at least ``threshold``; bool, on the CPU."""
    count = math.prod(shape)
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    return (draws.view(torch.int16)[:count] >= threshold - _STEPS // 2).view(shape)


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements in training."""
        return dropout(x, self.p) if self.training and self.p > 0 else x
