"""Masks of annotations, checked and brought into the forms that Detectron2 reads."""

import contextlib
import math
from typing import Any

from pycocotools import mask as mask_util

from .structure import to_number


def normalise_mask(value: Any, size: tuple[int, int]) -> list[list[float]] | dict[str, Any] | None:
    """A ``segmentation`` in one of the two forms that Detectron2 reads.

    Args:
        value: polygons, one flat polygon, or a run-length encoding, compressed or not.
        size: width and height of the image in pixels.

    Returns:
        The polygons of at least three points, or a compressed run-length encoding of the size of
        the image; None if the value has no mask.
    """
    if isinstance(value, dict):
        return _normalise_runs(value, size)
    if not isinstance(value, list):
        return None
    if value and not any(isinstance(part, list) for part in value):
        value = [value]  # one polygon without the list around it
    polygons = [part for part in value if _is_polygon(part)]
    return polygons or None


def _is_polygon(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 6 or len(value) % 2:
        return False
    with contextlib.suppress(OverflowError):
        # 24 times as fast as looking at each coordinate
        if set(map(type, value)) <= {int, float} and math.isfinite(sum(value)):
            return True
    return all(not isinstance(v, str) and math.isfinite(to_number(v)) for v in value)


def _normalise_runs(value: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
    width, height = size
    counts = value.get("counts")
    if value.get("size") != [height, width]:
        return None
    if isinstance(counts, list):
        if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != height * width:
            return None
        runs: dict[str, Any] = mask_util.frPyObjects(value, height, width)
        return {"size": [height, width], "counts": runs["counts"].decode("ascii")}
    # pycocotools does not check a compressed text; it consists of these characters only.
    if not isinstance(counts, str) or not counts or not all("0" <= c <= "o" for c in counts):
        return None
    if _total(counts) != height * width:
        return None
    return {"size": [height, width], "counts": counts}


def _total(counts: str) -> int:
    """The number of pixels of a compressed run-length encoding; -1 if it is malformed.

    As ``rleFrString`` of pycocotools: groups of five bits, of which the sixth says that another
    follows; from the third run on, the difference from the run before the previous one is stored.
    """
    runs: list[int] = []
    number, shift = 0, 0
    for character in counts:
        code = ord(character) - 48
        number |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            number -= 1 << shift
        runs.append(number + (runs[-2] if len(runs) > 2 else 0))
        number, shift = 0, 0
    return sum(runs) if not shift and all(run >= 0 for run in runs) else -1
