"""Frozen batch norm folded into the convolution before it.

A frozen batch norm is ``y = x * s + b`` with constant ``s`` and ``b`` per channel, so
``norm(conv(x, w)) = conv(x, w * s) + b``: exact but for rounding, and one pass over memory instead
of three.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from miti_detr.layers import POINTWISE_DILATION


def fold_frozen_batch_norm(module: nn.Module) -> int:
    """Let every convolution with a frozen batch norm below ``module`` compute both at once.

    Parameters, buffers and state-dict keys stay as they are, and gradients still reach the weights.
    Convolutions with another norm, or none, are left alone.

    Args:
        module: changed in place; for example any Detectron2 ResNet.

    Returns:
        How many convolutions were changed.
    """
    count = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
                setattr(parent, name, FoldedConv2d.of(child))
                count += 1
    return count


class FoldedConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with a :class:`FrozenBatchNorm2d`, computed as one convolution."""

    norm: FrozenBatchNorm2d
    _cache: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    @classmethod
    def of(cls, conv: Conv2d) -> "FoldedConv2d":
        """A folded twin that shares the parameters, norm and activation of ``conv``."""
        folded = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            norm=conv.norm,
            activation=conv.activation,
            device="meta",  # no memory and no random numbers for weights that are replaced
        )
        folded.weight, folded.bias = conv.weight, conv.bias
        return folded.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (N, C, H, W), norm included, then apply the activation."""
        pointwise = x.device.type == "cpu" and self.kernel_size == (1, 1)
        dilation = POINTWISE_DILATION if pointwise else self.dilation
        geometry = (self.stride, self.padding, dilation, self.groups)
        if self._is_trained() and not self._is_left_to_torch():
            scale, bias = self._scale_and_bias()
            x = _ScaledConvolution.apply(x, self.weight, scale, bias, geometry)
        else:
            x = F.conv2d(x, *self._folded(), *geometry)
        return x if self.activation is None else self.activation(x)

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and self.weight.requires_grad

    def _is_left_to_torch(self) -> bool:
        """Whether the backward pass has to be torch's own, with what it keeps."""
        return (
            torch.compiler.is_compiling()
            or torch.is_autocast_enabled(self.weight.device.type)
            or isinstance(self.padding, str)  # pixels of it are known to torch's forward pass alone
        )

    def _folded(self) -> tuple[Tensor, Tensor]:
        """The weight and bias of the one convolution; kept while nothing they come from changes."""
        if self._is_trained() or torch.compiler.is_compiling():
            return self._fold()
        sources = (self.weight, self.bias, *self.norm.buffers())
        dtype = self._compute_dtype()
        key = (dtype, *((t.data_ptr(), t._version) for t in sources if t is not None))
        if self._cache is None or self._cache[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = self._fold()
                weight = weight.to(dtype, memory_format=torch.channels_last)
                self._cache = key, weight, bias.to(dtype)
        return self._cache[1:]

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
        device = self.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.weight.dtype


class _ScaledConvolution(torch.autograd.Function):
    """A convolution with scaled weights, which are made again in the backward pass, not kept.

    The scale has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, geometry: tuple[Any, ...]
    ) -> Tensor:
        """Convolve (N, C, H, W); ``geometry`` is stride, padding, dilation and groups."""
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = geometry
        return F.conv2d(x, weight * scale[:, None, None, None], bias, *geometry)

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
        return for_x, for_weight.mul_(scale), None, for_bias, None
