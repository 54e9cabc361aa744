"""Large linear layers through oneDNN, for CPUs.

What it computes: ``torch.nn.functional.linear``. On CPUs torch hands float32 matrix products to
MKL, which uses the widest vector instructions of Intel's processors only, and convolutions to
oneDNN, which uses those of any processor. A large linear layer in float32 is therefore computed as
a 1x1 convolution. Under bfloat16 autocast without gradient, weights are cast and brought into
oneDNN's layout once instead of in each call.

Where: on CPUs, in eager mode, for products of more than 8 million multiply-adds. In training only
the first technique applies.

How exact: rounding.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exchange import exchange, is_recorded
from .kept import Kept
from .onednn import can_fuse, is_enabled, multiply, pack_linear
from .prepared_weights import prepared

# Dilation has no effect on a 1x1 kernel, but without it torch does not call oneDNN for a single
# thread and a small batch.
POINTWISE_DILATION = (2, 2)

_LARGE_INPUT = 20481  # elements; torch asks oneDNN for no smaller ones
_LARGE_PRODUCT = 2**23  # multiply-adds from which a product is worth a longer call

PackedWeight = tuple[Tensor, Tensor | None]


class FastLinear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    _kept: Kept[PackedWeight]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if (weight_and_bias := prepared(self)) is not None:
            return F.linear(x, *weight_and_bias)
        return linear(x, self.weight, self.bias, kept=self._kept)

    def _weights_to_prepare(self) -> tuple[Tensor, Tensor | None, None]:
        return self.weight, self.bias, None


def apply(model: nn.Module) -> int:
    """Exchange the linear layers below ``model``; return how many there were."""
    found = [module for module in model.modules() if type(module) is nn.Linear]
    for module in found:
        exchange(module, FastLinear)
        module._kept = Kept()  # type: ignore[assignment]
    return len(found)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: slice = slice(None),
    kept: Kept[PackedWeight] | None = None,
) -> Tensor:
    """Apply a linear layer, or some of its rows.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,), or none.
        rows: which rows of weight and bias are used.
        kept: holds the weights of these rows for autocast without gradient.

    Returns:
        (..., rows), contiguous.
    """
    if not is_recorded() and _is_large(x, weight[rows]):
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            if kept is not None and can_fuse(x, dtype, weight, bias):
                make = functools.partial(_pack, weight, bias, rows, dtype, x.shape[:-1].numel())
                return multiply(x.to(dtype), *kept.get(make, (weight, bias), dtype))
        elif x.device.type == "cpu" and x.dtype == torch.float32 and is_enabled():
            return _as_convolution(x, weight[rows], None if bias is None else bias[rows])
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


def _as_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # In the layout (1, I, n, 1) with features side by side, nothing is copied and the result is
    # contiguous, which fused attention needs.
    pixels = x.reshape(1, -1, 1, x.shape[-1]).contiguous().permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight[:, :, None, None], bias, dilation=POINTWISE_DILATION)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _pack(
    weight: Tensor, bias: Tensor | None, rows: slice, dtype: torch.dtype, count: int
) -> PackedWeight:
    packed = pack_linear(weight[rows].to(dtype), count)
    return packed, None if bias is None else bias[rows].to(dtype)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    return x.numel() >= _LARGE_INPUT and x.numel() * len(weight) >= _LARGE_PRODUCT
