"""Where the tokens of several levels lie.

N images, S tokens: the cells of each level row by row, level after level. Positions are (x, y) in
[0, 1]; those of a query refer to the un-padded image, those of attention to the padded level.
Source: fundamentalvision/Deformable-DETR ``models/deformable_transformer.py`` at 11169a6.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miti_detr.accelerate.exchange import is_recorded


class Pyramid(NamedTuple):
    """The levels of a padded batch.

    Attributes:
        shapes: (h, w) of each level.
        mask: (N, S) bool, True = padding; None if nothing is padded.
        valid_sizes: (N, levels, 2) float32, columns and rows that are image.
        valid_ratios: (N, levels, 2) float32, their share of all columns and rows.
    """

    shapes: tuple[tuple[int, int], ...]
    mask: Tensor | None
    valid_sizes: Tensor
    valid_ratios: Tensor

    @classmethod
    def from_masks(cls, masks: Sequence[Tensor], device: torch.device) -> "Pyramid":
        """Describe levels with the padding masks (N, h, w), which are on the host."""
        valid = [((~mask[:, 0]).float(), (~mask[:, :, 0]).float()) for mask in masks]
        valid_sizes, valid_ratios = (
            torch.stack([torch.stack([f(x, 1), f(y, 1)], dim=-1) for x, y in valid], dim=1)
            for f in (torch.sum, torch.mean)
        )
        shapes = tuple((mask.shape[1], mask.shape[2]) for mask in masks)
        flat = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        # A batch without padding needs no mask, which is faster. A recorded model must have one.
        is_padded = is_recorded() or bool(flat.any())
        flat, valid_sizes, valid_ratios = (
            x.to(device, non_blocking=True) for x in (flat, valid_sizes, valid_ratios)
        )
        return cls(shapes, flat if is_padded else None, valid_sizes, valid_ratios)

    def cell_centres(self) -> Tensor:
        """Centres of all cells in the un-padded image, (N, S, 2); beyond 1 in the padding."""
        device = self.valid_ratios.device
        levels = []
        for level, (h, w) in enumerate(self.shapes):
            y, x = (torch.arange(n, device=device) + 0.5 for n in (h, w))
            centres = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).flatten(0, 1)
            levels.append(centres / self.valid_sizes[:, level, None])
        return torch.cat(levels, dim=1)

    def on_levels(self, references: Tensor) -> Tensor:
        """Bring points (N, Lq, 2) or boxes (N, Lq, 4) of the image to each padded level.

        Returns:
            (N, Lq, levels, 2 or 4).
        """
        ratios = self.valid_ratios[:, None]
        if references.shape[-1] == 4:
            ratios = torch.cat([ratios, ratios], dim=-1)
        return references[:, :, None] * ratios

    def per_level(self, vectors: Tensor) -> Tensor:
        """Repeat one vector of each level, (levels, C), for its cells: (S, C)."""
        rows = zip(vectors, self.shapes, strict=True)
        return torch.cat([vector.expand(h * w, -1) for vector, (h, w) in rows])
