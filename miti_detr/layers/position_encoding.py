"""Position encodings of the feature grid, which depend only on the padding mask.

N images, h x w grid, F features per axis; an encoding has 2F channels. Masks are bool, True =
padding.
Source: DETR, appendix A.4; facebookresearch/detr ``models/position_encoding.py`` at 29901c5.
"""

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Sines and cosines of the cell's row and column among the cells that are not padding.

    Channels: F of the row (y), then F of the column (x); in each block sine and cosine alternate.
    They are computed in float32, whatever the precision of the model, as published.
    """

    name = "sine"
    wavelengths: Tensor

    def __init__(
        self, num_pos_feats: int, *, normalize: bool = True, centred: bool = False
    ) -> None:
        """Make the encoding.

        Args:
            num_pos_feats: F, features per axis; even.
            normalize: scale rows and columns of each image to (0, 2 pi].
            centred: count cells 0.5, 1.5, ... instead of 1, 2, ..., as Deformable-DETR does.

        Raises:
            ValueError: if ``num_pos_feats`` is odd.
        """
        super().__init__()
        if num_pos_feats % 2:
            raise ValueError(
                f"num_pos_feats must be even, not {num_pos_feats}: sine and cosine come in pairs"
            )
        self.normalize = normalize
        self.shift = 0.5 if centred else 0.0
        # Of the pairs: t_{2j} = t_{2j+1} = 10000^(2j / F)
        exponent = torch.arange(0, num_pos_feats, 2, dtype=torch.float32) / num_pos_feats
        self.register_buffer("wavelengths", 10000.0**exponent, persistent=False)

    def forward(self, mask: Tensor) -> Tensor:
        """Compute the encoding.

        Args:
            mask: (N, h, w) bool, True = padding; on any device.

        Returns:
            (N, 2F, h, w) float32.
        """
        valid = (~mask).to(self.wavelengths.device, torch.float32, non_blocking=True)
        return torch.cat([self._features(valid, axis) for axis in (1, 2)], dim=1)

    def _features(self, valid: Tensor, axis: int) -> Tensor:
        position = valid.cumsum(axis) - self.shift
        if self.normalize:
            position = position / (valid.sum(axis, keepdim=True) + 1e-6) * (2 * math.pi)
        angle = position[:, None] / self.wavelengths.float()[:, None, None]  # (N, F/2, h, w)
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1, 2)


class LearnedPositionEncoding(nn.Module):
    """A learned vector for each row and each column; ignores the mask.

    Channels: F of the column (x), then F of the row (y): the opposite of the sine encoding, as
        published.
    """

    name = "learned"

    def __init__(self, num_pos_feats: int, *, max_size: int = 50) -> None:
        """Make tables of F = ``num_pos_feats`` for grids of up to ``max_size`` squared cells."""
        super().__init__()
        self.row_embed = nn.Embedding(max_size, num_pos_feats)
        self.col_embed = nn.Embedding(max_size, num_pos_feats)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """Compute the encoding.

        Args:
            mask: (N, h, w) bool; only its shape is used.

        Returns:
            (N, 2F, h, w) in the dtype of the tables.

        Raises:
            ValueError: if the grid is larger than the tables.
        """
        n, h, w = mask.shape
        limit = self.row_embed.num_embeddings
        if max(h, w) > limit:
            raise ValueError(
                f"learned position encoding has {limit} rows and columns, the feature grid is "
                f"{h} x {w}: reduce INPUT.MAX_SIZE_* or use MODEL.DETR.POSITION_EMBEDDING sine"
            )
        x = self.col_embed.weight[:w].t()[:, None, :].expand(-1, h, w)
        y = self.row_embed.weight[:h].t()[:, :, None].expand(-1, h, w)
        return torch.cat([x, y]).expand(n, -1, h, w)


def build_position_encoding(name: str, d_model: int, *, centred: bool = False) -> nn.Module:
    """Make the encoding called ``sine`` or ``learned`` for tokens of width ``d_model``.

    ``centred`` is that of :class:`SinePositionEncoding`.

    Raises:
        ValueError: for another name, or a width that does not divide into the two axes.
    """
    if d_model % 2:
        raise ValueError(f"MODEL.DETR.HIDDEN_DIM must be even, not {d_model}")
    if name == "sine":
        return SinePositionEncoding(d_model // 2, centred=centred)
    if name == "learned":
        return LearnedPositionEncoding(d_model // 2)
    raise ValueError(f"MODEL.DETR.POSITION_EMBEDDING is {name!r}; use 'sine' or 'learned'")
