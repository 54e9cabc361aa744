"""oneDNN's fused layers: weights in its own layout, and ReLU and addition in the same pass.

These are private operators of torch, which its compiler uses; they have no gradient. Before the
first use their results are compared with those of the public operators, once per process. Where
they are missing or differ, the public operators are used, with one log line.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .exchange import is_recorded

logger = logging.getLogger(__name__)


class Geometry(NamedTuple):
    """How a convolution moves over its input, for height and width, and its groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def is_enabled() -> bool:
    """Whether torch has oneDNN and may use it."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def can_fuse(x: Tensor, dtype: torch.dtype, *sources: Tensor | None) -> bool:
    """Whether a layer without gradient may be computed by the functions of this module.

    Args:
        x: its input.
        dtype: in which it computes.
        sources: the other tensors that it uses.
    """
    if is_recorded() or x.device.type != "cpu" or x.numel() == 0 or not is_enabled():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *sources)):
        return False
    return dtype in (torch.float32, torch.bfloat16) and _works(dtype)


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Compare the operators of this module with public ones on a small problem."""
    try:
        supported = not torch.ops.mkldnn._is_mkldnn_acl_supported() and (
            dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        if not supported:
            return False
        with torch.inference_mode(False), torch.no_grad():
            difference = _difference(dtype)
        reason = f"they differ from the public ones by {difference:.2g} of the largest value"
        works = difference < (1e-5 if dtype == torch.float32 else 2e-2)
    except (RuntimeError, AttributeError, TypeError) as error:
        works, reason = False, str(error).partition("\n")[0]
    if not works:
        logger.info("oneDNN's fused operators are not used in %s: %s", dtype, reason)
    return works


def _difference(dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) - 0.5).to(dtype)

    layout = torch.channels_last
    x, weight, bias = random(2, 16, 9, 7), random(24, 16, 3, 3), random(24)
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    added = random(2, 24, 9, 7).contiguous(memory_format=layout)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    plain = F.conv2d(x, weight, bias, padding=1)
    packed = pack_convolution(weight, geometry, x.shape)
    tokens, matrix = random(3, 11, 32), random(40, 32)
    pairs = [
        (convolve(x, packed, bias, geometry), plain),
        (convolve(x, packed, bias, geometry, relu=True), F.relu(plain)),
        (convolve(x, packed, bias, geometry, add=added.clone(), relu=True), F.relu(plain + added)),
        (multiply(tokens, pack_linear(matrix, 33), None), F.linear(tokens, matrix)),
    ]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def pack_convolution(weight: Tensor, geometry: Geometry, shape: Sequence[int]) -> Tensor:
    """Bring the weight of a convolution into oneDNN's layout.

    Args:
        weight: (O, I / groups, kernel height, kernel width).
        geometry: of the convolution.
        shape: of an input; inputs of other shapes can be convolved with the result, too.
    """
    stride, padding, dilation, groups = geometry
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
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
        add: (N, O, H', W'), added to the result; it is overwritten.
        relu: apply ReLU to the sum.

    Returns:
        (N, O, H', W').
    """
    stride, padding, dilation, groups = geometry
    arguments = (x, packed, bias, padding, stride, dilation, groups)
    operators: Any = torch.ops.mkldnn
    y: Tensor
    if add is None:
        activation = "relu" if relu else "none"
        y = operators._convolution_pointwise(*arguments, activation, [], "")
    else:
        then = ("add", 1.0, "relu" if relu else None)
        y = operators._convolution_pointwise_.binary(add, *arguments, *then, [], "")
    return y


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    """Bring the weight of a linear layer into oneDNN's layout.

    Args:
        weight: (O, I).
        rows: of an input; inputs with other numbers of rows can be multiplied, too.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
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
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y
