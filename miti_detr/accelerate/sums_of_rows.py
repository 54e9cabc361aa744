"""Deformable attention as sums of rows of a table, for CPUs.

A bilinear sample is a weighted sum of four cells, so the output of a query and head is a weighted
sum of 4 x levels x points rows of a table that has one row for each cell and head.
``embedding_bag`` computes such sums without storing the samples. In the table each level has a
border of two zero cells, and all levels have the same row length, so that the four corners of a
sample are one index with four constant shifts, and samples outside need no special case. Gradients
of weights and locations are dot products with rows (``torch.sparse.sampled_addmm``); that of the
values is a sum of rows again, after the indices are sorted.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from miti_detr.layers.deformable_attention import Shapes

_BORDER = 2  # cells of zeros before each row and level
_EXACT = 2**24  # integers below are exact in float32
_CHUNK = 2**16  # points at once: what is computed for them stays in the cache
_ROWS = 2**13  # rows of a gradient at once, likewise


def can_sum(value: Tensor, shapes: Shapes, locations: Tensor) -> bool:
    """Whether :func:`sample_rows` can compute this: there is something, and not too much."""
    is_exact = _rows(shapes) * value.shape[2] < _EXACT and value.dtype != torch.float64
    return is_exact and value.numel() > 0 and locations.numel() > 0


def sample_rows(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Compute deformable attention on a CPU in float32.

    Arguments and result are those of :func:`miti_detr.layers.deformable_attention`.
    """
    levels = tuple((h, w) for h, w in shapes)
    result: Tensor = _SampleRows.apply(value.float(), levels, locations, weights.float())
    return result.to(value.dtype)


class _SampleRows(torch.autograd.Function):
    """Recomputes indices in the backward pass, which is cheaper than to keep them."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
    ) -> Tensor:
        """Sum rows; arguments as in :func:`sample_rows`, in float32."""
        table = _table(shapes, *locations.shape[2:5])
        rows = table.fill(value)
        ctx.save_for_backward(rows, locations, weights)
        ctx.shapes = shapes
        n, queries, heads = locations.shape[:3]
        result = value.new_empty(n, queries, heads, value.shape[-1])
        for block in table.blocks(n, queries):
            points = table.points(locations, weights, block)
            total: Tensor | None = None
            for shift, weight in zip(table.shifts, points.corner_weights(), strict=True):
                index = points.corner.view(-1, table.count)
                part = F.embedding_bag(
                    index,
                    rows[table.first(block) + shift :],
                    mode="sum",
                    per_sample_weights=weight.view_as(index),
                )
                total = part if total is None else total.add_(part)
            assert total is not None
            result[block.images, block.queries] = total.view(-1, block.length, *result.shape[2:])
        return result.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of value, locations and weights."""
        rows, locations, weights = ctx.saved_tensors
        table = _table(ctx.shapes, *locations.shape[2:5])
        n, queries = locations.shape[:2]
        gradient = gradient.contiguous().view(n, queries, table.heads, -1)
        for_rows = torch.zeros_like(rows)
        for_locations, for_weights = torch.empty_like(locations), torch.empty_like(weights)
        for images in table.groups(n, queries):
            pieces = []
            for block in table.blocks(n, queries, images):
                points = table.points(locations, weights, block)
                of_block = gradient[block.images, block.queries].flatten(0, 2)
                table.differentiate(
                    points,
                    _dot_products(rows[table.first(block) :], of_block, points.corner, table),
                    for_locations[block.images, block.queries],
                    for_weights[block.images, block.queries],
                )
                pieces.append((points.corner, *points.corner_weights()))
            index, *corners = (torch.cat(part).view(-1) for part in zip(*pieces, strict=True))
            of_group = gradient[images].flatten(0, 2)
            first = images.start * table.size
            target = for_rows[first : first + (images.stop - images.start) * table.size]
            _scatter(target, of_group, index, corners, table)
        return table.read(for_rows, n), None, for_locations, for_weights


class _Block(NamedTuple):
    """Some queries of some images. One of the two slices is of length 1 or complete."""

    images: slice
    queries: slice

    @property
    def length(self) -> int:
        """Number of queries."""
        return self.queries.stop - self.queries.start


class _Points(NamedTuple):
    """Sampling points of a block, each (queries, M levels points)."""

    corner: Tensor  # row of the first corner, int32, counted from the first image of the block
    x: Tensor  # share of the way to the next column
    y: Tensor  # share of the way to the next row
    weight: Tensor

    def corner_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights of the four corners: top left, top right, bottom left, bottom right."""
        right = self.weight * self.x
        left = self.weight - right
        bottom_right, bottom_left = right * self.y, left * self.y
        return left - bottom_left, right - bottom_right, bottom_left, bottom_right


@functools.lru_cache(maxsize=64)
def _table(shapes: Shapes, heads: int, levels: int, points: int) -> "_Table":
    """The layout for these sizes, which the layers of a model share."""
    with torch.inference_mode(False):
        return _Table(shapes, heads, levels, points)


class _Table:
    """Layout of the table, and what is the same for all queries.

    Attributes:
        size: rows of one image.
        count: rows that a query and head adds up for one corner: levels x points.
        shifts: from the first corner of a sample to its four corners.
    """

    def __init__(self, shapes: Shapes, heads: int, levels: int, points: int) -> None:
        """Lay out levels of these shapes for ``points`` points of each head on each level."""
        self.shapes = shapes
        self.pitch = max(w for _, w in shapes) + _BORDER
        self.heads = heads
        self.size = _rows(shapes) * heads
        self.count = levels * points
        self.shifts = (0, heads, self.pitch * heads, (self.pitch + 1) * heads)
        self.starts = [
            sum(h + _BORDER for h, _ in shapes[:level]) + _BORDER for level in range(levels)
        ]

        def of_levels(numbers: list[int]) -> Tensor:
            row = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(heads, levels, points)
            return row.reshape(-1)

        self.widths, self.heights = (of_levels([s[axis] for s in shapes]) for axis in (1, 0))
        head = torch.arange(heads).repeat_interleave(self.count)
        cells = [start * self.pitch + _BORDER for start in self.starts]
        self.offsets = of_levels(cells) * heads + head
        self.half = torch.tensor(-0.5)

    def fill(self, value: Tensor) -> Tensor:
        """Rows (N size, D) of values (N, S, M, D)."""
        n, _, heads, width = value.shape
        table = value.new_zeros(n, self.size // heads // self.pitch, self.pitch, heads * width)
        for level, part in self._levels(table, value):
            level.copy_(part)
        return table.view(-1, width)

    def read(self, rows: Tensor, n: int) -> Tensor:
        """Values (N, S, M, D) from rows: the inverse of :meth:`fill`."""
        width = rows.shape[-1]
        value = rows.new_empty(n, sum(h * w for h, w in self.shapes), self.heads, width)
        table = rows.view(n, -1, self.pitch, self.heads * width)
        for level, part in self._levels(table, value):
            part.copy_(level)
        return value

    def _levels(self, table: Tensor, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views (N, h, w, C) of each level in a table and in values."""
        cell = 0
        for start, (h, w) in zip(self.starts, self.shapes, strict=True):
            part = value[:, cell : cell + h * w].view(len(value), h, w, -1)
            yield table[:, start : start + h, _BORDER : _BORDER + w], part
            cell += h * w

    def groups(self, n: int, queries: int) -> list[slice]:
        """Images that are processed together: one, or several with few points."""
        step = max(1, _CHUNK // (queries * self.heads * self.count))
        step = min(step, max(1, (2**31 - 1) // self.size))
        return [slice(first, min(first + step, n)) for first in range(0, n, step)]

    def blocks(self, n: int, queries: int, images: slice | None = None) -> list[_Block]:
        """Cut all queries, or those of a group of images, into blocks that fit into the cache."""
        step = max(1, _CHUNK // (self.heads * self.count))
        groups = self.groups(n, queries) if images is None else [images]
        if queries <= step:
            return [_Block(group, slice(0, queries)) for group in groups]
        cuts = range(0, queries, step)
        return [
            _Block(group, slice(cut, min(cut + step, queries))) for group in groups for cut in cuts
        ]

    def first(self, block: _Block) -> int:
        """First row of the first image of a block."""
        return int(block.images.start) * self.size

    def points(self, locations: Tensor, weights: Tensor, block: _Block) -> _Points:
        """Find the corners of the sampling points of a block."""
        chosen = locations[block.images, block.queries]
        images = len(chosen)
        x, y = (
            torch.addcmul(self.half, chosen[..., axis].reshape(-1, len(size)), size)
            for axis, size in ((0, self.widths), (1, self.heights))
        )
        # Beyond the border there are only zeros.
        x = torch.minimum(x.clamp_(min=-_BORDER), self.widths, out=x)
        y = torch.minimum(y.clamp_(min=-_BORDER), self.heights, out=y)
        column, row = x.floor(), y.floor()
        index = torch.add(self.offsets, row, alpha=self.pitch * self.heads)
        index = index.add_(column, alpha=self.heads).to(torch.int32)
        index.clamp_(0, self.size - 1 - self.shifts[-1])  # NaN has become any number
        if images > 1:
            first = torch.arange(images, dtype=torch.int32) * self.size
            index.view(images, -1).add_(first[:, None])
        weight = weights[block.images, block.queries].reshape(-1, len(self.widths))
        return _Points(index, x.sub_(column), y.sub_(row), weight)

    def differentiate(
        self,
        points: _Points,
        products: list[Tensor],
        for_locations: Tensor,
        for_weights: Tensor,
    ) -> None:
        """Write the gradients of locations and weights of a block.

        Args:
            points: of the block.
            products: of the output's gradient with the values at the four corners.
            for_locations: (images, queries, M, levels, points, 2), overwritten.
            for_weights: (images, queries, M, levels, points), overwritten.
        """
        top_left, top_right, bottom_left, bottom_right = products
        along_x = top_right - top_left
        along_y = bottom_left - top_left
        twist = (bottom_right - bottom_left).sub_(along_x)
        along_x.addcmul_(twist, points.y)
        sample = torch.addcmul(top_left, along_y, points.y).addcmul_(along_x, points.x)
        along_y.addcmul_(twist, points.x)
        for_weights.copy_(sample.view_as(for_weights))
        along_x.mul_(points.weight).mul_(self.widths)
        along_y.mul_(points.weight).mul_(self.heights)
        for_locations[..., 0] = along_x.view_as(for_weights)
        for_locations[..., 1] = along_y.view_as(for_weights)


def _rows(shapes: Shapes) -> int:
    """Cells of one image in a table, with borders."""
    pitch = max(w for _, w in shapes) + _BORDER
    return (sum(h + _BORDER for h, _ in shapes) + _BORDER + 1) * pitch


def _dot_products(rows: Tensor, vectors: Tensor, index: Tensor, table: _Table) -> list[Tensor]:
    """Products of vectors (R, D) with ``count`` rows each, at each of the four corners."""
    ends = torch.arange(0, index.numel() + 1, table.count, dtype=index.dtype)
    unused = vectors.new_zeros(index.numel())
    products = []
    for shift in table.shifts:
        shifted = rows[shift:]
        size = (len(vectors), len(shifted))
        pattern = torch.sparse_csr_tensor(
            ends, index.view(-1), unused, size, check_invariants=False
        )
        found = torch.sparse.sampled_addmm(pattern, vectors, shifted.t(), beta=0.0)
        products.append(found.values().view_as(index))
    return products


def _scatter(
    rows: Tensor, vectors: Tensor, index: Tensor, corners: list[Tensor], table: _Table
) -> None:
    """Add weighted vectors to rows: the gradient of the sums of rows.

    Args:
        rows: (T, D), added to.
        vectors: (R, D).
        index: (R count) row of the first corner.
        corners: four weights (R count).
        table: the layout.
    """
    shifts: tuple[int, ...] = table.shifts
    points = index.numel()
    if points < len(rows):  # few: one sum for all corners
        index = torch.cat([index + shift for shift in shifts])
        corners, shifts = [torch.cat(corners)], (0,)
    order = index.sort(stable=True).indices
    sorted_weights = [weight.index_select(0, order) for weight in corners]
    if len(shifts) == 1:
        order.remainder_(points)
    counts = torch.bincount(index, minlength=len(rows))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    source = order.div(table.count, rounding_mode="floor").to(torch.int32)
    edges = [*range(0, len(rows), _ROWS), len(rows)]
    bounds = starts[edges].tolist()
    for first, last, begin, end in zip(edges, edges[1:], bounds, bounds[1:], strict=False):
        if begin == end:
            continue
        offsets = (starts[first:last] - begin).to(torch.int32)
        for shift, weight in zip(shifts, sorted_weights, strict=True):
            part = F.embedding_bag(
                source[begin:end],
                vectors,
                offsets,
                mode="sum",
                per_sample_weights=weight[begin:end],
            )
            # The last rows of a table are border, where nothing is sampled with a weight.
            target = rows[first + shift : last + shift]
            target.add_(part[: len(target)])
