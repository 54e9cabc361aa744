"""Deformable attention: each query reads a few points of feature maps instead of every cell.

N images, S cells of all levels together, Lq queries, M heads, D channels per head, C = M D.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import at_least_float32

Shapes = Sequence[tuple[int, int]]  # (h, w) of each level


def deformable_attention(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Weighted sum of bilinear samples of feature maps, for each query and head.

    A location (x, y) in [0, 1] spans a level from the outer edge of its first cell to that of its
    last one. What lies outside is 0. Locations are read in float32 or better, so that a model in
    bfloat16 does not sample from the wrong cells.

    Args:
        value: (N, S, M, D), the cells of each level row by row, level after level.
        spatial_shapes: (h, w) of each level.
        sampling_locations: (N, Lq, M, levels, points, 2), x then y.
        attention_weights: (N, Lq, M, levels, points).

    Returns:
        (N, Lq, M D) in the dtype of ``value``.

    Raises:
        ValueError: if the levels do not have S cells together.

    Source: Deformable DETR (Zhu et al., 2021), equation (3); fundamentalvision/Deformable-DETR
    ``models/ops/functions/ms_deform_attn_func.py`` at 11169a6.
    """
    n, cells, heads, width = value.shape
    sizes = [h * w for h, w in spatial_shapes]
    if sum(sizes) != cells:
        raise ValueError(f"levels {list(spatial_shapes)} do not have the {cells} cells of value")
    dtype = torch.promote_types(value.dtype, torch.float32)
    grids = 2 * sampling_locations.to(dtype) - 1
    sampled = []
    for level, cells_of_level in enumerate(value.to(dtype).split(sizes, dim=1)):
        feature = cells_of_level.permute(0, 2, 3, 1).reshape(-1, width, *spatial_shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (N M, Lq, points, 2)
        sampled.append(F.grid_sample(feature, grid, align_corners=False))  # (N M, D, Lq, points)
    weights = attention_weights.to(dtype).transpose(1, 2).flatten(0, 1).flatten(2)
    result = (torch.cat(sampled, dim=-1) * weights[:, None]).sum(-1)  # (N M, D, Lq)
    return result.reshape(n, heads * width, -1).transpose(1, 2).to(value.dtype)


class DeformableAttention(nn.Module):
    """Attention to ``num_points`` points of each level per head, whose places the query chooses.

    Weights are a softmax over all points of all levels. At first the points of a head lie in one
    of M directions around the reference, 1, 2, ... cells away, with equal weights.

    State-dict keys are those of fundamentalvision/Deformable-DETR
    ``models/ops/modules/ms_deform_attn.py`` at 11169a6.
    """

    def __init__(self, d_model: int, nhead: int, *, num_levels: int, num_points: int) -> None:
        """Make attention of width C = ``d_model``.

        Raises:
            ValueError: if ``nhead`` does not divide ``d_model``.
        """
        super().__init__()
        if nhead < 1 or d_model < 1 or d_model % nhead:
            raise ValueError(
                f"MODEL.DETR.HIDDEN_DIM {d_model} is not divisible by MODEL.DETR.NHEADS {nhead}"
            )
        self.nhead = nhead
        self.num_levels = num_levels
        self.num_points = num_points
        points = nhead * num_levels * num_points
        self.sampling_offsets = nn.Linear(d_model, points * 2)
        self.attention_weights = nn.Linear(d_model, points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.nhead) * (2 * math.pi / self.nhead)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)[:, None]  # (points, 1)
        offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        self.sampling_offsets.bias.copy_(offsets.flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        query: Tensor,
        references: Tensor,
        value: Tensor,
        spatial_shapes: Shapes,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: (N, Lq, C).
            references: (N, Lq, levels, 2) points (x, y), or (N, Lq, levels, 4) boxes ``cxcywh``, in
                [0, 1] of each padded level. Offsets are in cells, or in shares of the box.
            value: (N, S, C), the cells of each level row by row, level after level.
            spatial_shapes: (h, w) of each level.
            padding_mask: (N, S) bool, True = padding, read as 0.

        Returns:
            (N, Lq, C).
        """
        locations, weights = self.sampling_points(query, references, spatial_shapes)
        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        value = value.unflatten(-1, (self.nhead, -1))
        return self.output_proj(self._sample(value, spatial_shapes, locations, weights))

    def sampling_points(
        self, query: Tensor, references: Tensor, spatial_shapes: Shapes
    ) -> tuple[Tensor, Tensor]:
        """Where each query looks, and how much each point counts; arguments of :meth:`forward`.

        Returns:
            Locations (N, Lq, M, levels, points, 2) in [0, 1] of each padded level, which may lie
            outside, in float32 or better, and weights (N, Lq, M, levels, points), which sum to 1
            for each query and head.
        """
        points = (self.num_levels, self.num_points)

        def of_points(x: Tensor) -> Tensor:
            # (..., levels, 2) as one row for each head: broadcasting over short inner dimensions is
            # slow on CPUs.
            return x[..., None, :].expand(*x.shape[:-1], self.num_points, 2).flatten(-3)

        offsets = self.sampling_offsets(query).unflatten(-1, (self.nhead, -1))
        offsets = at_least_float32(offsets)
        if references.shape[-1] == 2:
            # Not new_tensor, which makes constants of the sizes while a model is recorded.
            sizes = [offsets.new_full((), side) for h, w in spatial_shapes for side in (w, h)]
            offsets = offsets / of_points(torch.stack(sizes).view(-1, 2))
        else:
            sides = of_points(references[..., 2:])[:, :, None]
            offsets = offsets / self.num_points * sides * 0.5
        locations = of_points(references[..., :2])[:, :, None] + offsets
        weights = self.attention_weights(query).unflatten(-1, (self.nhead, -1)).softmax(-1)
        return locations.unflatten(-1, (*points, 2)), weights.unflatten(-1, points)

    def _sample(
        self, value: Tensor, spatial_shapes: Shapes, locations: Tensor, weights: Tensor
    ) -> Tensor:
        """Read the points; arguments and result as of :func:`deformable_attention`."""
        return deformable_attention(value, spatial_shapes, locations, weights)
