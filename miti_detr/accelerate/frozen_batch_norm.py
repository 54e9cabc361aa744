"""Frozen batch norm folded into the convolution before it.

What it computes: a frozen batch norm is ``y = x * s + b`` with constant ``s`` and ``b`` per
channel, so ``norm(conv(x, w)) = conv(x, w * s) + b``: one pass over memory instead of three. In
training the scaled weight is computed again in the backward pass instead of being kept. Without
gradient it is kept between calls, and oneDNN convolves with weights in its own layout.

Where: Detectron2's ``Conv2d`` with ``FrozenBatchNorm2d``, on any device. When compiling, the
compiler fuses the plain form.

A strided 1x1 convolution of few channels, in whose backward pass torch corrupts memory for inputs
in channels_last layout, is computed on the pixels that it uses, without a stride.

How exact: rounding.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .channels_last import is_unsafe
from .exchange import exchange, is_recorded
from .kept import Kept
from .linear import POINTWISE_DILATION
from .onednn import Geometry, can_fuse, convolve, pack_convolution
from .prepared_weights import prepared


def apply(model: nn.Module) -> int:
    """Exchange the convolutions with a frozen norm below ``model``; return how many there were."""
    found = [
        module
        for module in model.modules()
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d)
    ]
    for module in found:
        exchange(module, FoldedConv2d)
        module._kept = Kept()  # type: ignore[assignment]
    return len(found)


class FoldedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with a :class:`FrozenBatchNorm2d`, computed as one convolution."""

    norm: FrozenBatchNorm2d
    _kept: Kept[tuple[Tensor, Tensor]]

    def forward(self, x: Tensor, *, add: Tensor | None = None, relu: bool = False) -> Tensor:
        """Convolve, norm and activation included.

        Args:
            x: (N, C, H, W).
            add: (N, O, H', W'), added to the result; may be overwritten.
            relu: apply ReLU to the sum.

        Returns:
            (N, O, H', W').
        """
        if is_recorded() or self.norm._forward_hooks or self.norm._forward_pre_hooks:
            return _finish(super().forward(x), add, relu)
        dtype = self._compute_dtype()
        geometry = self._geometry(x)
        if is_unsafe(self) and torch.is_grad_enabled():
            rows, columns = geometry.stride
            x, geometry = x[:, :, ::rows, ::columns].contiguous(), geometry._replace(stride=(1, 1))
        if (weight_and_bias := prepared(self)) is not None:
            x = F.conv2d(x, *weight_and_bias, **geometry._asdict())
        elif self._is_fused(x, dtype, add):
            packed, bias = self._folded(dtype, geometry, x.shape)
            return convolve(x.to(dtype), packed, bias, geometry, add=add, relu=relu)
        elif self._is_trained() and not self._is_left_to_torch():
            x = _ScaledConvolution.apply(x, self.weight, *self._scale_and_bias(), geometry)
        else:
            x = F.conv2d(x, *self._folded(dtype, geometry), **geometry._asdict())
        if self.activation is not None:
            x = self.activation(x)
        return _finish(x, add, relu)

    def _is_fused(self, x: Tensor, dtype: torch.dtype, add: Tensor | None) -> bool:
        """Whether oneDNN computes everything in one pass, with weights in its layout."""
        if self.activation is not None or isinstance(self.padding, str):
            return False
        if not (x.dtype == dtype or self._is_autocast()):
            return False
        if add is not None and not (add.dtype == dtype and _is_channels_last(add)):
            return False
        return can_fuse(x, dtype, self.weight, self.bias, add) and _is_channels_last(x)

    def _weights_to_prepare(self) -> tuple[Tensor, None, FrozenBatchNorm2d] | None:
        return (self.weight, None, self.norm) if self.bias is None else None

    def _geometry(self, x: Tensor) -> Geometry:
        pointwise = x.device.type == "cpu" and self.kernel_size == (1, 1)
        dilation = POINTWISE_DILATION if pointwise else self.dilation
        return Geometry(self.stride, self.padding, dilation, self.groups)

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def _is_left_to_torch(self) -> bool:
        """Whether torch's own backward pass is needed.

        Autocast casts inside of it, and the pixels of a padding given by name are known to torch's
        forward pass only.
        """
        return self._is_autocast() or isinstance(self.padding, str)

    def _folded(
        self, dtype: torch.dtype, geometry: Geometry, shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution; packed for oneDNN if ``shape`` is given."""
        if shape is None and self._is_trained():
            return self._fold()
        make = functools.partial(self._make_folded, dtype, geometry, shape)
        sources = (self.weight, self.bias, *self.norm.buffers())
        return self._kept.get(make, sources, dtype, shape is not None)

    def _make_folded(
        self, dtype: torch.dtype, geometry: Geometry, shape: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        weight, bias = self._fold()
        weight = weight.to(dtype, memory_format=torch.channels_last)
        if shape is not None:
            weight = pack_convolution(weight, geometry, shape)
        return weight, bias.to(dtype)

    def _fold(self) -> tuple[Tensor, Tensor]:
        scale, bias = self._scale_and_bias()
        return self.weight * scale[:, None, None, None], bias

    def _scale_and_bias(self) -> tuple[Tensor, Tensor]:
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        return scale, bias

    def _compute_dtype(self) -> torch.dtype:
        if self._is_autocast():
            return torch.get_autocast_dtype(self.weight.device.type)
        return self.weight.dtype

    def _is_autocast(self) -> bool:
        return torch.is_autocast_enabled(self.weight.device.type)


class _ScaledConvolution(torch.autograd.Function):
    """A convolution whose scaled weights are computed again in the backward pass.

    The scale has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, geometry: Geometry
    ) -> Tensor:
        """Convolve (N, C, H, W)."""
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = geometry
        return F.conv2d(x, weight * scale[:, None, None, None], bias, **geometry._asdict())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        """Gradients of input, weight and bias, those of them that are needed."""
        x, weight, scale = ctx.saved_tensors
        scale = scale[:, None, None, None]
        stride, padding, dilation, groups = ctx.geometry
        for_x, for_weight, _, for_bias, _ = ctx.needs_input_grad
        for_x, for_weight, for_bias = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight * scale,
            [len(weight)],
            stride,
            padding,
            dilation,
            False,  # not transposed
            [0, 0],
            groups,
            [for_x, for_weight, for_bias],
        )
        if for_weight is not None:
            for_weight = for_weight.mul_(scale)
        return for_x, for_weight, None, for_bias, None


def _finish(x: Tensor, add: Tensor | None, relu: bool) -> Tensor:
    if add is not None:
        x = x.add_(add)
    return F.relu_(x) if relu else x


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)
