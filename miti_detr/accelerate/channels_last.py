"""Convolutions in channels_last layout.

What it computes: the same. The kernels are stored with channels side by side, which lets a
convolution return its result in that layout, whatever the layout of its input. oneDNN and cuDNN
then need no copies between layouts.

Where: every ``nn.Conv2d``, on any device. A network with a strided 1x1 convolution of fewer than 16
input channels keeps its layout: torch corrupts memory in the backward pass of such a convolution
on CPUs (torch 2.11 to 2.14).

How exact: rounding.
"""

import torch
from torch import nn

_FEWEST_CHANNELS = 16


def apply(model: nn.Module) -> int:
    """Change the layout of the convolutions below ``model``; return how many were changed."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if any(is_unsafe(module) for module in found):
        return 0
    for module in found:
        module.to(memory_format=torch.channels_last)
    return len(found)


def is_unsafe(conv: nn.Conv2d) -> bool:
    """Whether torch corrupts memory in the backward pass for channels_last inputs on a CPU."""
    strided = max(conv.stride) > 1
    return conv.kernel_size == (1, 1) and strided and conv.in_channels < _FEWEST_CHANNELS
