"""The annotations of a whole data set as arrays, and which of them are faulty.

COCO's training set has 860,001 annotations: checking them one by one in Python would take longer
than reading them.
"""

import json
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

# Kinds of faults, from the gravest; an annotation is counted under the first that fits.
FAULTS = (
    "unknown image id",
    "unknown category id",
    "'ignore' is set, which Detectron2 does not support",
    "box is not four finite numbers",
    "box of zero or negative size",
    "box outside the image",
)
# Detectron2's loader of COCO files stops at annotations with these faults
FATAL_FAULTS = FAULTS[1:3]

_REQUIRED = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name")}


@dataclass(frozen=True)
class Annotations:
    """``A`` annotations on ``M`` images.

    Attributes:
        source: the file or data set, for messages.
        ids: what names each annotation in messages.
        image_names: (M) what names each image in messages.
        raw_image: (A) what names the image of each annotation.
        image: (A) int64 index of the image; -1 if unknown.
        raw_category: (A) category ids as they stand in the data.
        category: (A) int64 contiguous category; -1 if unknown.
        boxes: (A, 4) float64 xyxy in pixels; NaN where they cannot be read.
        crowd: (A) bool.
        ignore: (A) bool.
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
    sizes: np.ndarray

    def faults(self) -> np.ndarray:
        """(A) int64: index into :data:`FAULTS`, or -1 for a sound annotation."""
        size = np.append(self.sizes, [[np.nan, np.nan]], axis=0)[self.image]
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        conditions = [
            self.image < 0,
            self.category < 0,
            self.ignore,
            ~np.isfinite(self.boxes).all(axis=1),
            (high <= low).any(axis=1),
            ((low >= size) | (high <= 0)).any(axis=1),
        ]
        return np.select(conditions, list(range(len(FAULTS))), default=-1)

    def describe(self, index: int, fault: int) -> str:
        """One line that names a faulty annotation and its fault."""
        x0, y0, x1, y1 = (float(v) for v in self.boxes[index].round(3))
        values = f"category {self.raw_category[index]!r}, box x {x0}..{x1}, y {y0}..{y1}"
        place = f"annotation {self.ids[index]}, image {self.raw_image[index]}"
        return f"{place}: {FAULTS[fault]} ({values})"

    def objects_per_image(self) -> np.ndarray:
        """(M) int64: the number of annotations that are no crowds."""
        valid = ~self.crowd & (self.image >= 0)
        return np.bincount(self.image[valid], minlength=len(self.sizes))


def count_faults(faults: np.ndarray) -> str:
    """What :meth:`Annotations.faults` found, as ``12 x box outside the image, ...``."""
    counts = Counter(faults[faults >= 0].tolist())
    return ", ".join(f"{n} x {FAULTS[fault]}" for fault, n in sorted(counts.items()))


def read_coco_json(path: str | Path) -> dict[str, Any]:
    """Read a file in COCO format and check its structure.

    Returns:
        Its content; ``annotations`` may be missing (test sets without published annotations).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON, or a required field is missing, or ids repeat; with the place.
    """
    try:
        content = json.loads(Path(PathManager.get_local_path(str(path))).read_bytes())
    except FileNotFoundError as e:
        raise FileNotFoundError(f"Annotation file {path} does not exist") from e
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{path} is broken JSON: line {e.lineno}, column {e.colno}: {e.msg}"
        ) from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not a JSON text: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not in COCO format: it holds a {type(content).__name__}")
    for key, fields in _REQUIRED.items():
        _check_records(path, content, key, fields)
    for image in content["images"]:
        if not all(isinstance(image[k], int | float) and image[k] > 0 for k in ("width", "height")):
            raise ValueError(f"{path}: image {image['id']} has no valid width and height: {image}")
    if "annotations" in content:
        _check_records(path, content, "annotations", ("id",))
    return content


def annotations_of_coco(content: dict[str, Any], source: str) -> Annotations:
    """The annotations of a file read by :func:`read_coco_json`."""
    images, records = content["images"], content.get("annotations", [])
    index_of_image = {image["id"]: i for i, image in enumerate(images)}
    contiguous = {k: i for i, k in enumerate(sorted(c["id"] for c in content["categories"]))}
    raw_image = [record.get("image_id") for record in records]
    raw_category = [record.get("category_id") for record in records]
    boxes = _to_array([record.get("bbox") for record in records])
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    return Annotations(
        source=source,
        ids=[record["id"] for record in records],
        image_names=[image["id"] for image in images],
        raw_image=raw_image,
        image=_lookup(index_of_image, raw_image),
        raw_category=raw_category,
        category=_lookup(contiguous, raw_category),
        boxes=boxes,
        crowd=np.array([bool(record.get("iscrowd", 0)) for record in records], dtype=bool),
        ignore=np.array([bool(record.get("ignore", 0)) for record in records], dtype=bool),
        sizes=_to_sizes(images),
    )


def annotations_of_dicts(
    dicts: list[dict[str, Any]], source: str, num_classes: int | None = None
) -> Annotations:
    """The annotations of Detectron2 dataset dicts.

    Args:
        dicts: boxes in ``XYXY_ABS`` or ``XYWH_ABS``; other modes count as unreadable.
        source: the data set, for messages.
        num_classes: categories from here on are unknown. None: all that are not negative are known.
    """
    pairs = [(i, record) for i, d in enumerate(dicts) for record in d.get("annotations", ())]
    modes = np.array([_box_mode(record) for _, record in pairs], dtype=np.int64)
    boxes = _to_array([record.get("bbox") for _, record in pairs])
    boxes[modes == BoxMode.XYWH_ABS, 2:] += boxes[modes == BoxMode.XYWH_ABS, :2]
    boxes[(modes != BoxMode.XYWH_ABS) & (modes != BoxMode.XYXY_ABS)] = np.nan
    raw_category = [record.get("category_id") for _, record in pairs]
    names = [d.get("file_name", f"number {i}") for i, d in enumerate(dicts)]
    known = _natural_numbers(raw_category) if num_classes is None else set(range(num_classes))
    return Annotations(
        source=source,
        ids=[f"{k} (in the order of the data set)" for k in range(len(pairs))],
        image_names=names,
        raw_image=[names[i] for i, _ in pairs],
        image=np.array([i for i, _ in pairs], dtype=np.int64),
        raw_category=raw_category,
        category=_lookup({k: k for k in known}, raw_category),
        boxes=boxes,
        crowd=np.array([bool(record.get("iscrowd", 0)) for _, record in pairs], dtype=bool),
        ignore=np.zeros(len(pairs), dtype=bool),
        sizes=_to_sizes(dicts),
    )


def drop_faulty(
    dicts: list[dict[str, Any]], num_classes: int | None = None
) -> list[dict[str, Any]]:
    """Dataset dicts without their faulty annotations (the same list if there are none)."""
    bad = annotations_of_dicts(dicts, "", num_classes).faults() >= 0
    if not bad.any():
        return dicts
    flags = iter(bad.tolist())
    kept = []
    for d in dicts:
        if "annotations" in d:
            d = {**d, "annotations": [a for a in d["annotations"] if not next(flags)]}
        kept.append(d)
    return kept


def _check_records(
    path: str | Path, content: dict[str, Any], key: str, fields: tuple[str, ...]
) -> None:
    """Check that a list of records is there, has the required fields, and no id twice."""
    records = content.get(key)
    if not isinstance(records, list) or (not records and key != "annotations"):
        raise ValueError(f"{path} is not in COCO format: it has no list '{key}'")
    for i, record in enumerate(records):
        for field in fields:
            if not isinstance(record, dict) or field not in record:
                raise ValueError(f"{path}: entry {i} of '{key}' has no '{field}': {record!r:.200}")
    ids = [record["id"] for record in records]
    if len(set(ids)) < len(ids):
        twice = next(k for k, n in Counter(ids).items() if n > 1)
        raise ValueError(f"{path}: several entries of '{key}' have the id {twice!r}")


def _lookup(table: dict[Any, int], keys: list[Any]) -> np.ndarray:
    """(A) int64: values of the keys, -1 for those that are not in the table."""
    found = [table.get(k, -1) if isinstance(k, Hashable) else -1 for k in keys]
    return np.array(found, dtype=np.int64)


def _natural_numbers(values: list[Any]) -> set[int]:
    return {int(v) for v in values if isinstance(v, Integral) and int(v) >= 0}


def _to_array(boxes: list[Any]) -> np.ndarray:
    """(A, 4) float64; NaN where a box is not a list of four numbers."""
    try:
        array = np.array(boxes)
    except ValueError:  # lists of different length
        array = np.array(None)
    if array.dtype.kind in "iuf" and array.shape == (len(boxes), 4):
        return array.astype(np.float64)
    rows = [b if _is_box(b) else [np.nan] * 4 for b in boxes]
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _is_box(box: Any) -> bool:
    if not isinstance(box, list | tuple | np.ndarray) or len(box) != 4:
        return False
    return all(isinstance(v, int | float | np.number) for v in box)


def _box_mode(record: dict[str, Any]) -> int:
    mode = record.get("bbox_mode")
    return mode if isinstance(mode, int) else -1


def _to_sizes(records: list[dict[str, Any]]) -> np.ndarray:
    """(M, 2) float64 width and height; NaN where they are not given."""
    sizes = [(r.get("width", np.nan), r.get("height", np.nan)) for r in records]
    return np.array(sizes, dtype=np.float64).reshape(-1, 2)
