import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miti_detr.predict.detections import Found
from miti_detr.predict.tiles import Window, join, windows_of

SIZE = (300, 500)


def find(boxes: list[list[float]], window: Window, scores: list[float] | None = None) -> Found:
    """What a perfect detector finds of objects of class 0 in a window."""
    table = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    origin = np.array([window[0], window[1]] * 2)
    limit = np.array([window[2] - window[0], window[3] - window[1]] * 2)
    cut = np.clip(table - origin, 0, limit)
    seen = ((cut[:, 2:] - cut[:, :2]) > 3).all(axis=1)
    score = np.array(scores or [0.9] * len(table), dtype=np.float32)
    return Found(cut[seen].astype(np.float32), score[seen], np.zeros(seen.sum(), np.int64))


@given(
    height=st.integers(1, 900),
    width=st.integers(1, 900),
    tile=st.integers(1, 400),
    overlap=st.floats(0, 0.9),
)
def test_tiles_cover_the_image(height: int, width: int, tile: int, overlap: float) -> None:
    """Each pixel is in a tile, tiles have one size, and neighbours share what was asked for."""
    if tile < 20:
        height, width = height % 60 + 1, width % 60 + 1
    whole, *tiles = windows_of((height, width), tile, overlap)
    assert whole == (0, 0, width, height)
    if height <= tile and width <= tile:
        assert not tiles
        return
    seen = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in tiles:
        assert (right - left, bottom - top) == (min(tile, width), min(tile, height))
        seen[top:bottom, left:right] = True
    assert seen.all()
    for low, high in ((0, 2), (1, 3)):
        spans = sorted({(window[low], window[high]) for window in tiles})
        shared = [one[1] - other[0] for one, other in itertools.pairwise(spans)]
        assert all(pixels >= min(tile - 1, int(tile * overlap)) for pixels in shared)


def test_without_tiles_nothing_changes() -> None:
    found = find([[1, 2, 30, 40]], (0, 0, 500, 300))
    assert windows_of(SIZE, None) == [(0, 0, 500, 300)]
    assert join(SIZE, windows_of(SIZE, None), [found]) is found


@pytest.mark.parametrize(
    "boxes",
    [
        [[10, 10, 40, 50]],  # in one tile
        [[90, 90, 115, 115]],  # in several tiles, whole
        [[60, 20, 160, 60]],  # cut by a border
        [[20, 20, 480, 280]],  # larger than a tile
        [[5, 100, 495, 130]],  # through all tiles of a row
        [[10, 10, 40, 50], [45, 10, 80, 50], [12, 60, 40, 90]],  # neighbours
        [[60, 20, 160, 60], [60, 64, 160, 104]],  # two that are cut at the same border
        [[0, 0, 500, 300], [200, 100, 230, 130]],  # a small one inside of a large one
    ],
)
def test_objects_are_put_together(boxes: list[list[float]]) -> None:
    """A perfect detector in each window gives each object once, with its own box."""
    windows = windows_of(SIZE, 128, 0.3)
    joined = join(SIZE, windows, [find(boxes, window) for window in windows])
    order = np.lexsort(joined.boxes.T[::-1])
    np.testing.assert_allclose(joined.boxes[order], sorted(boxes), atol=1e-3)


def test_without_the_whole_image_parts_are_still_joined() -> None:
    """The network may see nothing in the reduced image."""
    boxes = [[60.0, 20.0, 330.0, 60.0]]
    windows = windows_of(SIZE, 128, 0.3)
    parts = [find(boxes, window) for window in windows]
    parts[0] = find([], windows[0])
    np.testing.assert_allclose(join(SIZE, windows, parts).boxes, boxes, atol=1e-3)


def test_the_best_score_counts_and_classes_stay_apart() -> None:
    windows = [(0, 0, 500, 300), (0, 0, 300, 300), (200, 0, 500, 300)]
    parts = [find([[210, 50, 260, 90]], window, [0.5]) for window in windows]
    parts[2] = parts[2]._replace(scores=np.array([0.8], np.float32))
    joined = join(SIZE, windows, parts)
    np.testing.assert_allclose(joined.scores, [0.8])
    parts[1] = parts[1]._replace(classes=np.array([1]))
    assert sorted(join(SIZE, windows, parts).classes.tolist()) == [0, 1]


def test_nothing_found() -> None:
    windows = windows_of(SIZE, 128)
    joined = join(SIZE, windows, [find([], window) for window in windows])
    assert joined.boxes.shape == (0, 4)
    assert len(joined.scores) == len(joined.classes) == 0
