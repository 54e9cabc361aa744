"""Linear layers at the speed of convolutions."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .derived import Derived
from .onednn import is_enabled, is_for_onednn, is_recorded, multiply, pack_linear

# Of a 1x1 convolution on a CPU. It means nothing there, but with a single thread and fewer than 16
# images torch would not ask oneDNN for a convolution without.
POINTWISE_DILATION = (2, 2)

_LARGE_INPUT = 20481  # elements; torch asks oneDNN for no smaller ones
_LARGE_PRODUCT = 2**23  # multiply-adds from which on a product is worth a longer call


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kept: Derived[tuple[Tensor, Tensor | None]] | None = None,
) -> Tensor:
    """``torch.nn.functional.linear``; large ones on a CPU by faster functions of oneDNN.

    On CPUs torch leaves matrix products in float32 to MKL, which uses the widest vectors of Intel's
    processors only, and convolutions to oneDNN, which uses those of any: here they are 1x1
    convolutions. The layouts are the same, so nothing is copied but for an input that is not
    contiguous. Autocast casts the weights in each call; here, without gradient, it does so once.
    Differs by rounding.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,), or none.
        kept: for this weight alone; holds it for autocast.

    Returns:
        (..., O), contiguous.
    """
    if is_recorded() or not _is_large(x, weight):
        return F.linear(x, weight, bias)
    if kept is not None and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if is_for_onednn(x, dtype, weight, bias):
            make = functools.partial(_pack, weight, bias, dtype, x.shape[:-1].numel())
            return multiply(x.to(dtype), *kept.get(make, (weight, bias), dtype))
    if not _as_convolution(x):
        return F.linear(x, weight, bias)
    # channels_last, (1, I, n, 1): another layout would be that of the result as well, and attention
    # without weights in memory needs its features side by side.
    pixels = x.reshape(1, -1, 1, x.shape[-1]).contiguous().permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight[:, :, None, None], bias, dilation=POINTWISE_DILATION)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`: the same parameters, keys and initialisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of torch's."""
        super().__init__(*args, **kwargs)
        self._kept: Derived[tuple[Tensor, Tensor | None]] = Derived()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias, kept=self._kept)


def _pack(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: int
) -> tuple[Tensor, Tensor | None]:
    return pack_linear(weight.to(dtype), rows), None if bias is None else bias.to(dtype)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    return x.numel() >= _LARGE_INPUT and x.numel() * len(weight) >= _LARGE_PRODUCT


def _as_convolution(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and is_enabled()
    )
