"""The annotations of a whole data set as arrays, and which of them are faulty.

COCO's training set has 860,001 annotations. Checking them one by one in Python would take longer
than reading them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from .structure import to_number

# Kinds of faults, worst first. An annotation is counted under the first kind that applies.
FAULTS = (
    "unknown image id",
    "unknown category id",
    "'ignore' is set, which Detectron2 does not support",
    "'iscrowd' is neither 0 nor 1",
    "'segmentation' is neither polygons nor a run-length encoding of the image's size",
    "box is not four finite numbers",
    "box of zero or negative size",
    "box outside the image",
)
# Detectron2's loader or evaluator stops at annotations with these faults
FATAL_FAULTS = FAULTS[1:4]

_FALSE = {"", "0", "0.0", "false", "no", "none", "null"}
_TRUE = {"1", "1.0", "true", "yes"}
_MAX_LISTED = 10


@dataclass(frozen=True)
class Annotations:
    """``A`` annotations on ``M`` images.

    Attributes:
        source: the file or data set, for messages.
        ids: what names each annotation in messages.
        image_names: (M) what names each image in messages.
        raw_image: (A) what names the image of each annotation.
        image: (A) int64 index of the image; -1 if unknown.
        raw_category: (A) category ids as written in the data.
        category: (A) int64 contiguous category; -1 if unknown.
        boxes: (A, 4) float64 xyxy in pixels; NaN where they cannot be read.
        crowd: (A) int64 0 or 1; -1 if it cannot be read.
        ignore: (A) bool.
        no_mask: (A) bool: masks are trained, and this annotation has none that can be read.
        sizes: (M, 2) float64 width and height in pixels; NaN if unknown.
    """

    source: str
    ids: Sequence[Any]
    image_names: Sequence[Any]
    raw_image: Sequence[Any]
    image: np.ndarray
    raw_category: Sequence[Any]
    category: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray
    no_mask: np.ndarray
    sizes: np.ndarray

    def faults(self) -> np.ndarray:
        """(A) int64: index into :data:`FAULTS`, or -1 for a sound annotation."""
        size = np.append(self.sizes, [[np.nan, np.nan]], axis=0)[self.image]
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        conditions = [
            self.image < 0,
            self.category < 0,
            self.ignore,
            self.crowd < 0,
            self.no_mask,
            ~np.isfinite(self.boxes).all(axis=1),
            (high <= low).any(axis=1),
            ((low >= size) | (high <= 0)).any(axis=1),
        ]
        return np.select(conditions, list(range(len(FAULTS))), default=-1)

    def report(self, faults: np.ndarray, advice: str) -> str:
        """An error message: the counts, then the first faulty annotations, one line each.

        Args:
            faults: of :meth:`faults`, at least one.
            advice: what the user can do.
        """
        bad = np.flatnonzero(faults >= 0)
        lines = [self._describe(i, faults[i]) for i in bad[:_MAX_LISTED]]
        if len(bad) > _MAX_LISTED:
            lines.append(f"... and {len(bad) - _MAX_LISTED} more")
        return "\n  ".join([f"{self.source}: {summarise(faults)}; {advice}", *lines])

    def _describe(self, index: int, fault: int) -> str:
        x0, y0, x1, y1 = (float(v) for v in self.boxes[index].round(3))
        values = f"category {self.raw_category[index]!r:.50}, box x {x0}..{x1}, y {y0}..{y1}"
        place = f"annotation {self.ids[index]!s:.50}, image {self.raw_image[index]!s:.200}"
        return f"{place}: {FAULTS[fault]} ({values})"

    def usable(self) -> np.ndarray:
        """(A) bool: sound annotations of single objects."""
        return (self.faults() < 0) & (self.crowd == 0)

    def objects_per_image(self) -> np.ndarray:
        """(M) int64: the number of annotations that are not crowds."""
        valid = (self.crowd == 0) & (self.image >= 0)
        return np.bincount(self.image[valid], minlength=len(self.sizes))


def summarise(faults: np.ndarray) -> str:
    """What :meth:`Annotations.faults` found, as ``2 of 9 annotations are faulty: 2 x ...``."""
    counts = Counter(faults[faults >= 0].tolist())
    kinds = ", ".join(f"{n} x {FAULTS[fault]}" for fault, n in sorted(counts.items()))
    return f"{sum(counts.values())} of {len(faults)} annotations are faulty: {kinds}"


def annotations_of_dicts(
    dicts: list[dict[str, Any]],
    source: str,
    num_classes: int | None = None,
    *,
    with_masks: bool = False,
) -> Annotations:
    """The annotations of Detectron2 dataset dicts.

    Args:
        dicts: boxes in ``XYXY_ABS`` or ``XYWH_ABS``; other modes count as unreadable.
        source: the data set, for messages.
        num_classes: categories from this number on are unknown. None: all that are not negative
            are known.
        with_masks: an annotation without ``segmentation`` is faulty.
    """
    pairs = [(i, record) for i, d in enumerate(dicts) for record in d.get("annotations", ())]
    modes = np.array([_box_mode(record) for _, record in pairs], dtype=np.int64)
    boxes = to_boxes([record.get("bbox") for _, record in pairs])
    boxes[modes == BoxMode.XYWH_ABS, 2:] += boxes[modes == BoxMode.XYWH_ABS, :2]
    boxes[(modes != BoxMode.XYWH_ABS) & (modes != BoxMode.XYXY_ABS)] = np.nan
    raw_category = [record.get("category_id") for _, record in pairs]
    names = [d.get("file_name", f"number {i}") for i, d in enumerate(dicts)]
    flags = [record.get("iscrowd", 0) for _, record in pairs]
    crowd, repaired = to_flags(flags)
    if repaired:  # Detectron2 reads these dicts, too, and repairs nothing
        crowd[[not isinstance(flag, Integral | np.bool_) for flag in flags]] = -1
    return Annotations(
        source=source,
        ids=[f"{k} (in the order of the data set)" for k in range(len(pairs))],
        image_names=names,
        raw_image=[names[i] for i, _ in pairs],
        image=np.array([i for i, _ in pairs], dtype=np.int64),
        raw_category=raw_category,
        category=_contiguous(raw_category, num_classes),
        boxes=boxes,
        crowd=crowd,
        ignore=np.zeros(len(pairs), dtype=bool),
        no_mask=np.array([with_masks and not _has_mask(record) for _, record in pairs], dtype=bool),
        sizes=to_sizes(dicts),
    )


def drop_faulty(
    dicts: list[dict[str, Any]], num_classes: int | None = None, *, with_masks: bool = False
) -> list[dict[str, Any]]:
    """Dataset dicts without their faulty annotations (the same list if there are none)."""
    bad = annotations_of_dicts(dicts, "", num_classes, with_masks=with_masks).faults() >= 0
    if not bad.any():
        return dicts
    flags = iter(bad.tolist())
    kept = []
    for d in dicts:
        if "annotations" in d:
            d = {**d, "annotations": [a for a in d["annotations"] if not next(flags)]}
        kept.append(d)
    return kept


def to_boxes(boxes: list[Any]) -> np.ndarray:
    """(A, 4) float64; NaN where a box is not a list of four numbers."""
    try:
        array = np.array(boxes)
    except (ValueError, OverflowError):  # lists of different lengths, huge numbers
        array = np.array(None)
    if array.dtype.kind in "iuf" and array.shape == (len(boxes), 4):
        return array.astype(np.float64)
    rows = [_to_box(box) for box in boxes]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def to_flags(values: list[Any]) -> tuple[np.ndarray, int]:
    """Flags that should be 0 or 1, as exporters write them: ``null``, ``"0"``, ``true``, ``1.0``.

    Args:
        values: whatever the file holds.

    Returns:
        (A) int64 0 or 1, or -1 where the value means neither; and how many 0 and 1 were written
        differently.
    """
    if set(map(type, values)) <= {int} and set(values) <= {0, 1}:
        return np.array(values, dtype=np.int64), 0
    flags = np.array([_to_flag(value) for value in values], dtype=np.int64)
    written = np.array([type(value) is int for value in values], dtype=bool)
    return flags, int(((flags >= 0) & ~written).sum())


def to_sizes(records: list[dict[str, Any]]) -> np.ndarray:
    """(M, 2) float64 width and height; NaN where they are missing or not numbers."""
    sizes = [(to_number(r.get("width")), to_number(r.get("height"))) for r in records]
    return np.array(sizes, dtype=np.float64).reshape(-1, 2)


def _to_box(box: Any) -> list[float]:
    numbers = isinstance(box, list | tuple | np.ndarray) and len(box) == 4
    if not numbers or not all(isinstance(v, int | float | np.number) for v in box):
        return [np.nan] * 4
    return [to_number(v.item() if isinstance(v, np.number) else v) for v in box]


def _to_flag(value: Any) -> int:
    if isinstance(value, str):
        text = value.strip().lower()
        return 0 if text in _FALSE else 1 if text in _TRUE else -1
    if value is None:
        return 0
    if isinstance(value, int | float | np.number | np.bool_) and value in (0, 1):
        return int(value)
    return -1


def _contiguous(values: list[Any], num_classes: int | None) -> np.ndarray:
    """(A) int64: the categories of dataset dicts, -1 for those that are not classes."""
    limit = 2**31 if num_classes is None else num_classes

    def known(value: Any) -> bool:
        """Whether a value is the number of a class."""
        integral = isinstance(value, Integral) and not isinstance(value, bool)
        return integral and 0 <= int(value) < limit

    return np.array([int(v) if known(v) else -1 for v in values], dtype=np.int64)


def _has_mask(record: dict[str, Any]) -> bool:
    shape = record.get("segmentation")
    return isinstance(shape, list | tuple | dict) and len(shape) > 0


def _box_mode(record: dict[str, Any]) -> int:
    mode: Any = record.get("bbox_mode")
    known = type(mode) in (int, BoxMode) and mode in list(BoxMode)
    return int(mode) if known else -1
