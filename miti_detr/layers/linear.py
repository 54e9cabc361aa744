"""Linear layers at the speed of convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a 1x1 convolution on a CPU. It means nothing there, but with a single thread and fewer than 16
# images torch would not ask oneDNN for a convolution without.
POINTWISE_DILATION = (2, 2)

# Elements from which on a convolution is worth its longer call; torch asks oneDNN for no smaller
# input.
_LARGE_INPUT = 20481
_LARGE_WEIGHT = 2**15


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; large ones in float32 on a CPU as 1x1 convolution.

    On CPUs torch leaves matrix products to MKL, which uses the widest vectors of Intel's processors
    only, and convolutions to oneDNN, which uses those of any. The layouts are the same, so nothing
    is copied but for an input that is not contiguous. Differs by rounding.

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,), or none.

    Returns:
        (..., O), contiguous.
    """
    if not _as_convolution(x, weight):
        return F.linear(x, weight, bias)
    # channels_last, (1, I, n, 1): another layout would be that of the result as well, and attention
    # without weights in memory needs its features side by side.
    pixels = x.reshape(1, -1, 1, x.shape[-1]).contiguous().permute(0, 3, 1, 2)
    y = F.conv2d(pixels, weight[:, :, None, None], bias, dilation=POINTWISE_DILATION)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`linear`: the same parameters, keys and initialisation."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(x, self.weight, self.bias)


def _as_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether this is work for oneDNN; compilers and exporters shall see a linear layer."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= _LARGE_INPUT
        and weight.numel() >= _LARGE_WEIGHT
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
