"""Which cells of a feature grid are padding.

Images of a batch are padded at the bottom and right to a common size. Masks are bool, **True =
padding**.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_MASK_RULES = ("ceil", "nearest")


def feature_padding_mask(
    image_sizes: Sequence[tuple[int, int]] | Tensor,
    padded_size: Sequence[int],
    grid_size: Sequence[int],
    *,
    stride: int,
    rule: str,
) -> Tensor:
    """Padding mask on the feature grid of a batch.

    The two published rules agree when the padded size is a multiple of the stride; otherwise
    ``nearest`` can keep one more row or column.

    Args:
        image_sizes: (height, width) in pixels of each of the N images, before padding; or int64
            (N, 2) on any device, from which an exporter keeps N a variable.
        padded_size: (H, W) in pixels of the batch.
        grid_size: (h, w) of the feature map.
        stride: pixels per feature cell.
        rule: ``ceil``: an image of s pixels covers ceil(s / stride) cells (Detectron2 wrapper of
            DETR). ``nearest``: the pixel mask is resized by nearest neighbour (main repository).

    Returns:
        (N, h, w) bool, True = padding; on the CPU, or on the device of the sizes.

    Raises:
        ValueError: if ``rule`` is not one of :data:`PADDING_MASK_RULES`.
    """
    if rule not in PADDING_MASK_RULES:
        raise ValueError(f"MODEL.DETR.PADDING_MASK {rule!r} is not one of {PADDING_MASK_RULES}")
    lengths = image_sizes
    if not isinstance(lengths, Tensor):
        # One by one: while a model is traced, each size is a tensor, and must stay in the graph.
        lengths = torch.stack([torch.as_tensor(size) for size in lengths])
    axes = [
        _axis_padding(lengths[:, axis, None], padded_size[axis], grid_size[axis], stride, rule)
        for axis in (0, 1)
    ]
    return axes[0][:, :, None] | axes[1][:, None, :]


def _axis_padding(length: Tensor, padded: int, cells: int, stride: int, rule: str) -> Tensor:
    """Padding along one axis, (N, cells) bool, for lengths (N, 1)."""
    if rule == "ceil":
        return torch.arange(cells, device=length.device)[None] >= -(-length // stride)
    pixels = (torch.arange(padded, device=length.device)[None] >= length).float()
    # Not a formula: the rounding of this function in float32 is part of the published rule.
    return F.interpolate(pixels[None], size=cells)[0].bool()
