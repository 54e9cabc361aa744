"""The two forms of a mask that Detectron2 reads, and everything else that files hold."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_util

from miti_detr.data.coco.masks import normalise_mask
from tests.fuzz.budget import budget

SQUARE = [1, 1, 5, 1, 5, 4, 1, 4]


@pytest.mark.parametrize(
    ("value", "mask"),
    [
        ([SQUARE], [SQUARE]),
        (SQUARE, [SQUARE]),
        ([SQUARE, [1, 2, 3, 4]], [SQUARE]),
        ([[1, 1, 5, 1, 5, None]], None),
        ([[1, 1, 5, 1, 5, float("nan")]], None),
        ([[1, 1, 5, 4]], None),
        ([], None),
        ([[]], None),
        (None, None),
        ("abc", None),
        ({"counts": [3, 5, 12], "size": [4, 5]}, "5 pixels"),
        ({"counts": [3, 5, 13], "size": [4, 5]}, None),
        ({"counts": [3, 5, 12], "size": [5, 4]}, None),
        ({"counts": "\x00", "size": [4, 5]}, None),
        ({"counts": 5, "size": [4, 5]}, None),
        ({"size": [4, 5]}, None),
    ],
)
def test_forms(value: Any, mask: Any) -> None:
    """The image is 5 x 4."""
    found = normalise_mask(value, (5, 4))
    if mask == "5 pixels":
        assert isinstance(found, dict)
        assert mask_util.area(found) == 5
    else:
        assert found == mask


@pytest.mark.slow
@budget
@given(data=st.data())
def test_compressed_masks_are_kept_and_damaged_ones_refused(data: st.DataObject) -> None:
    """Whatever is kept has as many pixels as the image, so that decoding it is safe."""
    height, width = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    bits = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2, (height, width))
    runs = mask_util.encode(np.asfortranarray(bits.astype(np.uint8)))
    counts = runs["counts"].decode("ascii")
    value = {"size": [height, width], "counts": counts}
    assert normalise_mask(value, (width, height)) == value
    place = data.draw(st.integers(0, len(counts) - 1))
    damaged = counts[:place] + data.draw(st.characters(max_codepoint=130)) + counts[place + 1 :]
    kept = normalise_mask({**value, "counts": damaged}, (width, height))
    if kept is not None:
        assert isinstance(kept, dict)
        assert mask_util.decode(kept).shape == (height, width)
