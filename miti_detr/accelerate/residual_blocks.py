"""Residual blocks whose convolutions apply ReLU and the addition themselves.

What it computes: the blocks and the stem of Detectron2's ResNets. Without gradient, oneDNN applies
ReLU and the addition of the shortcut in the pass of the convolution; with gradient both happen in
place.

Where: ``BasicStem``, ``BasicBlock`` and ``BottleneckBlock`` whose convolutions all have a frozen
batch norm; one pass on CPUs, in inference and in frozen stages.

How exact: the order of operations is the same.
"""

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from .exchange import exchange
from .frozen_batch_norm import FoldedConv2d


def apply(model: nn.Module) -> int:
    """Exchange blocks and stems below ``model``, after their convolutions.

    Returns:
        How many there were.
    """
    parts = list(model.modules())
    blocks = [p for p in parts if type(p) in _FUSED and _is_folded(p)]
    for block in blocks:
        exchange(block, _FUSED[type(block)])
    fused = tuple(_FUSED.values())
    for part in parts:
        if type(part) is nn.Sequential and part and all(type(p) in fused for p in part):
            exchange(part, FusedStage)
    return len(blocks)


class FusedStem(BasicStem):
    """Detectron2's stem with the ReLU in its convolution."""

    conv1: FoldedConv2d

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to (N, C, H/4, W/4)."""
        if _is_hooked(self):
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)  # no other layout is fused
        return F.max_pool2d(self.conv1(x, relu=True), kernel_size=3, stride=2, padding=1)


class FusedStage(nn.Sequential):
    """Residual blocks; each may overwrite its input, if no hook has seen that."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        previous: nn.Module | None = None
        for block in self:
            unseen = previous is not None and not previous._forward_hooks
            x = block(x, unseen and not block._forward_pre_hooks)
            previous = block
        return x


class _FusedBlock(nn.Module):
    """The forward pass that basic and bottleneck blocks share."""

    shortcut: FoldedConv2d | None

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Add the output of the convolutions to ``x``.

        Args:
            x: (N, C, H, W).
            overwrite: ``x`` may be overwritten.

        Returns:
            (N, C', H', W').
        """
        if _is_hooked(self):
            plain: Tensor = super().forward(x)
            return plain
        *first, last = (c for name, c in self.named_children() if name.startswith("conv"))
        y = x
        for convolution in first:
            y = convolution(y, relu=True)
        if self.shortcut is not None:
            return last(y, add=self.shortcut(x), relu=True)
        if overwrite:
            return last(y, add=x, relu=True)
        return F.relu_(last(y).add_(x))


class FusedBasicBlock(_FusedBlock, BasicBlock):
    """Detectron2's ``BasicBlock`` of folded convolutions."""


class FusedBottleneckBlock(_FusedBlock, BottleneckBlock):
    """Detectron2's ``BottleneckBlock`` of folded convolutions."""


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicStem: FusedStem,
    BasicBlock: FusedBasicBlock,
    BottleneckBlock: FusedBottleneckBlock,
}


def _is_hooked(block: nn.Module) -> bool:
    """Whether a hook of a convolution has to see its output before ReLU and addition."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in block.children())


def _is_folded(block: nn.Module) -> bool:
    return all(isinstance(child, FoldedConv2d) for child in block.children())
