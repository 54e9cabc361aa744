"""Masks of detections by NumPy only.

n detections, H x W pixels of the image as it was given, h' x w' grid of mask logits.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Size = tuple[int, int]  # height and width


def run_lengths(masks: np.ndarray) -> np.ndarray:
    """Encode masks as COCO's compressed run lengths, as ``pycocotools.mask.encode`` does.

    Args:
        masks: (n, H, W) bool, or what this function returns, which stays as it is.

    Returns:
        (n,) of ``{"size": [H, W], "counts": text}``.
    """
    if masks.dtype == object:
        return masks
    encoded = np.empty(len(masks), dtype=object)
    for index, mask in enumerate(masks):
        encoded[index] = {"size": list(mask.shape), "counts": _to_text(_runs(mask))}
    return encoded


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of a mask, column by column; the first one is outside of the object."""
    pixels = mask.T.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    first = [0] if pixels[0] else []
    return first + np.diff(changes, prepend=0, append=pixels.size).tolist()


def _to_text(runs: list[int]) -> str:
    """Groups of five bits, of which the sixth says that another follows; then differences.

    From the fourth run on, the difference from the run before the previous one is stored.
    """
    characters = []
    for index, run in enumerate(runs):
        number = run - runs[index - 2] if index > 2 else run
        more = True
        while more:
            bits = number & 0x1F
            number >>= 5
            more = number != (-1 if bits & 0x10 else 0)
            characters.append(chr((bits | 0x20 * more) + 48))
    return "".join(characters)


@dataclass(frozen=True)
class GridMasks:
    """Mask logits of detections on the grid of the network; masks in pixels are made of a few.

    Attributes:
        logits: (n, h', w') float32.
        padded: size of the padded batch, which the grid covers.
        image: size of the image in its top left corner.
        output: H and W.
    """

    logits: np.ndarray
    padded: Size
    image: Size
    output: Size

    def __getitem__(self, chosen: Any) -> "GridMasks":
        """Some of the masks, by indices, a slice or a mask."""
        return replace(self, logits=self.logits[chosen])

    def pixels(self) -> np.ndarray:
        """Masks (n, H, W) bool: the padding is cut off, logits are resized bilinearly."""
        rows, columns = (
            _interpolation(self.image[axis], self.output[axis])
            @ _interpolation(self.logits.shape[1 + axis], self.padded[axis])[: self.image[axis]]
            for axis in (0, 1)
        )
        masks = np.empty((len(self.logits), *self.output), dtype=bool)
        for mask, logits in zip(masks, self.logits, strict=True):
            mask[:] = rows @ logits @ columns.T > 0
        return masks


def _interpolation(before: int, after: int) -> np.ndarray:
    """Matrix (after, before) of linear interpolation along an axis, as torch's ``bilinear``."""
    place = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    low = np.floor(place).astype(np.int64)
    share = (place - low).astype(np.float32)
    matrix = np.zeros((after, before), dtype=np.float32)
    rows = np.arange(after)
    matrix[rows, low] = 1 - share
    matrix[rows, np.minimum(low + 1, before - 1)] += share
    return matrix
