"""oneDNN's layers with weights in its own layout, and what follows a convolution in the same pass.

Operators of torch that its compiler uses; they have no gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution moves over its input: of height and width each, and its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def is_recorded() -> bool:
    """Whether a compiler or an exporter looks on, which shall see torch's public operators."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def is_enabled() -> bool:
    """Whether torch has oneDNN, and may use it."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def is_for_onednn(x: Tensor, dtype: torch.dtype, *sources: Tensor | None) -> bool:
    """Whether a layer without gradient may be computed by the functions of this module.

    Args:
        x: its input.
        dtype: in which it computes.
        sources: what else it uses.
    """
    if is_recorded() or x.device.type != "cpu" or x.numel() == 0 or not _supports(dtype):
        return False
    return not (
        torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in (x, *sources))
    )


def _supports(dtype: torch.dtype) -> bool:
    # The Arm Compute Library behind oneDNN knows no operators in one pass.
    if not is_enabled() or _operators()._is_mkldnn_acl_supported():
        return False
    if dtype == torch.bfloat16:
        return bool(_operators()._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def pack_convolution(weight: Tensor, geometry: Geometry, shape: Sequence[int]) -> Tensor:
    """Bring the weight of a convolution into oneDNN's layout.

    Args:
        weight: (O, I / groups, kernel height, kernel width).
        geometry: of the convolution.
        shape: of an input; others can be convolved with the result, too.
    """
    stride, padding, dilation, groups = geometry
    packed: Tensor = _operators()._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(shape)
    )
    return packed


def convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    geometry: Geometry,
    *,
    add: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolve with a packed weight.

    Args:
        x: (N, I, H, W), in the precision of weight and bias.
        packed: from :func:`pack_convolution`.
        bias: (O,).
        geometry: of the convolution.
        add: (N, O, H', W'), added to the result; overwritten.
        relu: of the sum.

    Returns:
        (N, O, H', W').
    """
    stride, padding, dilation, groups = geometry
    arguments = (x, packed, bias, padding, stride, dilation, groups)
    y: Tensor
    if add is None:
        activation = "relu" if relu else "none"
        y = _operators()._convolution_pointwise(*arguments, activation, [], "")
    else:
        then = ("add", 1.0, "relu" if relu else None)
        y = _operators()._convolution_pointwise_.binary(add, *arguments, *then, [], "")
    return y


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    """Bring the weight of a linear layer into oneDNN's layout.

    Args:
        weight: (O, I).
        rows: of an input; others can be multiplied with the result, too.
    """
    packed: Tensor = _operators()._reorder_linear_weight(weight, rows)
    return packed


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a linear layer with a packed weight.

    Args:
        x: (..., I), in the precision of weight and bias.
        packed: from :func:`pack_linear`.
        bias: (O,), or none.

    Returns:
        (..., O), contiguous.
    """
    y: Tensor = _operators()._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _operators() -> Any:
    return torch.ops.mkldnn
