"""Detection on the tiles of a large image, and joining what several tiles have found.

A window is a rectangle of the image, (left, top, right, bottom) in pixels. The windows of an image
are overlapping tiles of one size, and the image as a whole, which sees what no tile can hold.
"""

from collections.abc import Sequence

import numpy as np

from .detections import Found

Window = tuple[int, int, int, int]

# Boxes of two windows are one object if their parts in both windows overlap by this IoU.
SAME_OBJECT = 0.5
# A box that ends so close to an inner border of its window is cut by it (part of the window).
BORDER = 0.01


def windows_of(size: tuple[int, int], tile: int | None, overlap: float = 0.2) -> list[Window]:
    """Return the whole image, then its tiles.

    Args:
        size: height and width of the image in pixels.
        tile: side of the tiles in pixels; None: no tiles.
        overlap: smallest part of its side that a tile shares with the next one, in [0, 1).

    Returns:
        Only the whole image if it is not larger than a tile.
    """
    height, width = size
    whole = [(0, 0, width, height)]
    if tile is None or (height <= tile and width <= tile):
        return whole
    rows, columns = _starts(height, tile, overlap), _starts(width, tile, overlap)
    return whole + [
        (left, top, min(left + tile, width), min(top + tile, height))
        for top in rows
        for left in columns
    ]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """First pixels of the tiles along one side, evenly spread."""
    if length <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    count = -(-(length - tile) // step) + 1
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def join(size: tuple[int, int], windows: Sequence[Window], found: Sequence[Found]) -> Found:
    """Join the detections of several windows of an image.

    Two detections of a class from overlapping windows are the same object if their boxes, cut to
    the pixels that both windows see, agree. An object that crosses a border is thus put together
    from its parts: each side of its box comes from the best detection that is not cut there.

    Args:
        size: height and width of the image in pixels.
        windows: of the image.
        found: for each window, with boxes in pixels of the window.

    Returns:
        Detections in pixels of the image; the score of an object is its best one.
    """
    if len(windows) == 1:
        return found[0]
    corners = np.asarray(windows, dtype=np.float32)
    owner = np.repeat(np.arange(len(found)), [len(one.scores) for one in found])
    shifts = corners[owner][:, [0, 1, 0, 1]]
    boxes = np.concatenate([one.boxes for one in found]) + shifts
    scores = np.concatenate([one.scores for one in found])
    classes = np.concatenate([one.classes for one in found])
    cut = _cut_sides(boxes, corners[owner], size)
    groups = _components(_same_object(boxes, classes, owner, corners))
    order = scores.argsort(kind="stable")[::-1]
    members: dict[int, list[int]] = {}
    for index in order.tolist():
        members.setdefault(int(groups[index]), []).append(index)
    joined = [_join_group(boxes[group], cut[group]) for group in members.values()]
    best = [group[0] for group in members.values()]
    return Found(np.array(joined, np.float32).reshape(-1, 4), scores[best], classes[best])


def _cut_sides(boxes: np.ndarray, windows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which sides (n, 4) of boxes end at a border of their window inside the image."""
    sides = (windows[:, 2:] - windows[:, :2])[:, [0, 1, 0, 1]]
    near = np.abs(boxes - windows) <= np.maximum(BORDER * sides, 1)
    outer = np.array([0, 0, size[1], size[0]], dtype=np.float32)
    return near & (windows != outer)


def _same_object(
    boxes: np.ndarray, classes: np.ndarray, owner: np.ndarray, windows: np.ndarray
) -> np.ndarray:
    """Pairs (m, 2) of detections that are the same object."""
    pairs = []
    for index in range(len(boxes)):
        later = np.flatnonzero((owner > owner[index]) & (classes == classes[index]))
        shared = _intersect(windows[owner[index]], windows[owner[later]])
        first, second = _intersect(boxes[index], shared), _intersect(boxes[later], shared)
        inside = _area(_intersect(first, second))
        union = _area(first) + _area(second) - inside
        same = later[(inside > 0) & (inside >= SAME_OBJECT * union)]
        pairs.append(np.stack([np.full_like(same, index), same], axis=1))
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), dtype=np.int64)


def _intersect(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low = np.maximum(first[..., :2], second[..., :2])
    return np.concatenate([low, np.minimum(first[..., 2:], second[..., 2:])], axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    sides = np.clip(boxes[..., 2:] - boxes[..., :2], 0, None)
    return sides[..., 0] * sides[..., 1]


def _components(pairs: np.ndarray) -> "_Groups":
    groups = _Groups()
    for first, second in pairs.tolist():
        groups.unite(first, second)
    return groups


class _Groups:
    """Disjoint sets of indices; each starts on its own."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:
        while (parent := self._parent.get(index, index)) != index:
            index = parent
        return index

    def unite(self, first: int, second: int) -> None:
        """Join the sets of two indices."""
        low, high = sorted((self[first], self[second]))
        self._parent[high] = low


def _join_group(boxes: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """One box for detections of one object, the best first.

    A side that is cut in all of them is as far out as any of them says.
    """
    extreme = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    best = cut.argmin(axis=0)  # the first that is not cut
    return np.where(cut.all(axis=0), extreme, boxes[best, np.arange(4)])
