"""Blocks of Detectron2's ResNets whose convolutions do ReLU and addition in the same pass."""

import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from .folding import FoldedConv2d


def fuse_residual_blocks(module: nn.Module) -> int:
    """Let blocks with folded convolutions below ``module`` leave ReLU and addition to these.

    Parameters, buffers, hooks and state-dict keys stay as they are. Other blocks are left alone.

    Args:
        module: changed in place; any Detectron2 ResNet, after
            :func:`~miti_detr.modeling.folding.fold_frozen_batch_norm`.

    Returns:
        How many blocks were changed, the stem included.
    """
    parts = list(module.modules())
    blocks = [p for p in parts if type(p) in _FUSED and _is_folded(p)]
    for block in blocks:
        block.__class__ = _FUSED[type(block)]
    for part in parts:
        if type(part) is nn.Sequential and part and all(type(p) in _FUSED.values() for p in part):
            part.__class__ = Stage
    return len(blocks)


class Stem(BasicStem):
    """Detectron2's, with ReLU in the convolution."""

    conv1: FoldedConv2d

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to (N, C, H/4, W/4)."""
        return F.max_pool2d(self.conv1(x, relu=True), kernel_size=3, stride=2, padding=1)


class Stage(nn.Sequential):
    """Residual blocks; each may overwrite what the one before gave, if no hook has seen it."""

    def forward(self, x: Tensor) -> Tensor:
        """Run them."""
        previous: nn.Module | None = None
        for block in self:
            unseen = previous is not None and not previous._forward_hooks
            x = block(x, unseen and not block._forward_pre_hooks)
            previous = block
        return x


class _ResidualBlock(nn.Module):
    """What basic and bottleneck blocks have in common."""

    shortcut: FoldedConv2d | None

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Add the output of the convolutions to ``x``.

        Args:
            x: (N, C, H, W).
            overwrite: ``x`` may be overwritten.

        Returns:
            (N, C', H', W').
        """
        *first, last = (c for name, c in self.named_children() if name.startswith("conv"))
        y = x
        for convolution in first:
            y = convolution(y, relu=True)
        if self.shortcut is not None:
            return last(y, add=self.shortcut(x), relu=True)
        if overwrite:
            return last(y, add=x, relu=True)
        return F.relu_(last(y).add_(x))


class ResidualBasicBlock(_ResidualBlock, BasicBlock):
    """Detectron2's ``BasicBlock`` of folded convolutions."""


class ResidualBottleneckBlock(_ResidualBlock, BottleneckBlock):
    """Detectron2's ``BottleneckBlock`` of folded convolutions."""


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicStem: Stem,
    BasicBlock: ResidualBasicBlock,
    BottleneckBlock: ResidualBottleneckBlock,
}


def _is_folded(block: nn.Module) -> bool:
    return all(isinstance(child, FoldedConv2d) for child in block.children())
