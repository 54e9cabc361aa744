"""A data set in COCO format, read once and normalised once, for training and evaluation alike."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
from detectron2.structures import BoxMode

from .annotations import Annotations, to_boxes, to_flags
from .ids import IdTable, canonical, number_annotations
from .masks import normalise_mask
from .structure import read_coco_json, to_number

_NO_GROUP = ("", "none", "null")  # what exporters write as the super-category of a root


@dataclass(frozen=True)
class CocoFile:
    """The normalised content of an annotation file.

    Attributes:
        path: the file.
        images: (M) entries of the file.
        image_ids: (M) integers; the file's own ids if every tool takes them, otherwise 1..M.
        original_image_ids: (M) the ids as written in the file.
        classes: (K) names of the categories, in the order of their ids.
        category_ids: (K) integers, like ``image_ids``.
        original_category_ids: (K) the ids as written in the file.
        records: (A) entries of the file.
        annotation_ids: (A) positive integers.
        annotations: (A) the fields that are used, as arrays.
        areas: (A) float64 square pixels, positive where the box is.
        masks: (A) see :func:`~miti_detr.data.coco.masks.normalise_mask`; None if they are not used.
        is_annotated: False for test sets without published annotations.
        repairs: what had to be repaired, and how often; empty if every tool can read the file.
    """

    path: str
    images: Sequence[dict[str, Any]]
    image_ids: Sequence[int]
    original_image_ids: Sequence[Any]
    classes: Sequence[str]
    category_ids: Sequence[int]
    original_category_ids: Sequence[Any]
    records: Sequence[dict[str, Any]]
    annotation_ids: Sequence[int]
    annotations: Annotations
    areas: np.ndarray
    masks: Sequence[Any] | None
    is_annotated: bool
    repairs: Counter[str]

    def to_dicts(self, image_root: str) -> list[dict[str, Any]]:
        """Detectron2 dataset dicts in the order of the image ids, without faulty annotations.

        Key points are left out, and so is the ``segmentation`` unless masks are used; Detectron2's
        own loader drops an annotation because of them, even where only boxes are trained.
        """
        dicts = [
            {
                "file_name": os.path.join(image_root, image["file_name"]),
                "height": image["height"],
                "width": image["width"],
                "image_id": number,
                "annotations": [],
            }
            for image, number in zip(self.images, self.image_ids, strict=True)
        ]
        for index, image, category, crowd in self._sound():
            dicts[image]["annotations"].append(
                {
                    "iscrowd": crowd,
                    "bbox": self.records[index]["bbox"],
                    "category_id": category,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    **self._mask(index),
                }
            )
        return sorted(dicts, key=lambda record: record["image_id"])

    def to_json(self) -> dict[str, Any]:
        """The content in COCO format, without faulty annotations, for evaluators."""
        content: dict[str, Any] = {
            "info": {"description": f"normalised copy of {self.path}"},
            "images": [
                {"id": number, **{key: image[key] for key in ("file_name", "width", "height")}}
                for image, number in zip(self.images, self.image_ids, strict=True)
            ],
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.classes, strict=True)
            ],
        }
        if self.is_annotated:
            content["annotations"] = [
                {
                    "id": self.annotation_ids[index],
                    "image_id": self.image_ids[image],
                    "category_id": self.category_ids[category],
                    "bbox": self.records[index]["bbox"],
                    "area": float(self.areas[index]),
                    "iscrowd": crowd,
                    **self._mask(index),
                }
                for index, image, category, crowd in self._sound()
            ]
        return content

    def _mask(self, index: int) -> dict[str, Any]:
        return {} if self.masks is None else {"segmentation": self.masks[index]}

    def _sound(self) -> Sequence[tuple[int, int, int, int]]:
        """Index, image, category and crowd flag of the annotations without a fault."""
        sound = np.flatnonzero(self.annotations.faults() < 0)
        fields = (self.annotations.image, self.annotations.category, self.annotations.crowd)
        columns = (sound, *(field[sound] for field in fields))
        return list(zip(*(column.tolist() for column in columns), strict=True))


def read_coco_file(path: str, image_root: str = "", *, with_masks: bool = False) -> CocoFile:
    """Read and normalise an annotation file in COCO format.

    Repaired are ids (texts, floats, null, negative or repeated ones), ``iscrowd`` and ``ignore``
    that are not written as 0 or 1, a missing or impossible ``area``, and file names with
    backslashes or ``%20``. A category that only groups others is left out.

    Args:
        path: JSON file.
        image_root: folder of the images, to decide between two forms of a file name.
        with_masks: check and keep ``segmentation``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be repaired; with the place.
    """
    repairs: Counter[str] = Counter()
    content = read_coco_json(path, repairs)
    images = _merge_repeated(path, content["images"], "images", "file_name", repairs)
    image_table = _index(path, images, "images")
    records = content.get("annotations", [])
    categories, category_table, raw_category, category = _categories(
        path, content["categories"], records, repairs
    )
    annotation_ids, repairs["annotation 'id'"] = number_annotations(
        [record.get("id") for record in records]
    )
    repairs["image 'id'"] += image_table.renumbered
    repairs["category 'id'"] += category_table.renumbered
    _repair_file_names(images, image_root, repairs)
    annotations, areas = _annotations(
        path, images, image_table, records, raw_category, category, repairs
    )
    masks = _masks(records, annotations, repairs) if with_masks else None
    if masks is not None:
        annotations.no_mask[:] = [mask is None for mask in masks]
    return CocoFile(
        path=path,
        images=images,
        image_ids=image_table.numbers,
        original_image_ids=image_table.ids,
        classes=[c["name"] for c in categories],
        category_ids=category_table.numbers,
        original_category_ids=category_table.ids,
        records=records,
        annotation_ids=annotation_ids,
        annotations=annotations,
        areas=areas,
        masks=masks,
        is_annotated="annotations" in content,
        repairs=+repairs,  # without zeros
    )


def _annotations(
    path: str,
    images: Sequence[dict[str, Any]],
    table: IdTable,
    records: Sequence[dict[str, Any]],
    raw_category: Sequence[Any],
    category: np.ndarray,
    repairs: Counter[str],
) -> tuple[Annotations, np.ndarray]:
    """The annotations as arrays, and their areas."""
    raw_image = [record.get("image_id") for record in records]
    image, repairs["'image_id'"] = table.find(raw_image)
    crowd, repairs["'iscrowd'"] = to_flags([record.get("iscrowd") for record in records])
    ignore, repairs["'ignore'"] = to_flags([record.get("ignore", 0) for record in records])
    boxes = to_boxes([record.get("bbox") for record in records])
    sizes = np.array([(i["width"], i["height"]) for i in images], dtype=np.float64).reshape(-1, 2)
    areas, repairs["'area'"] = _areas(records, boxes, np.append(sizes, [[np.inf] * 2], 0)[image])
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    annotations = Annotations(
        source=path,
        ids=[record.get("id", f"number {i}") for i, record in enumerate(records)],
        image_names=table.ids,
        raw_image=raw_image,
        image=image,
        raw_category=raw_category,
        category=category,
        boxes=boxes,
        crowd=crowd,
        ignore=ignore != 0,
        no_mask=np.zeros(len(records), dtype=bool),
        sizes=sizes,
    )
    return annotations, areas


def _index(path: str, entries: Sequence[dict[str, Any]], key: str) -> IdTable:
    try:
        return IdTable([entry["id"] for entry in entries])
    except ValueError as error:
        raise ValueError(f"{path}: '{key}': {error}") from error


def _merge_repeated(
    path: str, entries: list[dict[str, Any]], key: str, field: str, repairs: Counter[str]
) -> list[dict[str, Any]]:
    """Drop entries that repeat the id and the name of an earlier one."""
    ids = [entry["id"] for entry in entries]
    if set(map(type, ids)) <= {int} and len(set(ids)) == len(ids):
        return entries
    kept: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        marker = repr(entry["id"])
        first = kept.setdefault(marker, entry)
        if first is entry:
            continue
        if first[field] != entry[field]:
            raise ValueError(
                f"{path}: '{key}' has two entries with the id {entry['id']!r:.50}: "
                f"{first[field]!r} and {entry[field]!r}. Give each its own id"
            )
        repairs[f"repeated entry of '{key}'"] += 1
    return list(kept.values())


def _categories(
    path: str,
    entries: list[dict[str, Any]],
    records: Sequence[dict[str, Any]],
    repairs: Counter[str],
) -> tuple[list[dict[str, Any]], IdTable, list[Any], np.ndarray]:
    """The classes in order, their ids, and the category of each annotation as given and found."""
    entries = _merge_repeated(path, entries, "categories", "name", repairs)
    keys = [canonical(entry["id"]) for entry in entries]
    if all(type(key) is int for key in keys):
        entries = [entries[i] for i in sorted(range(len(keys)), key=keys.__getitem__)]
    raw = [record.get("category_id") for record in records]
    table = _index(path, entries, "categories")
    found, repaired = table.find(raw)
    used = set(np.unique(found).tolist())
    groups = [i for i in range(len(entries)) if i not in used and _is_group(entries, i)]
    if groups:
        for i in groups:
            repairs[f"category {entries[i]['name']!r}, which only groups others, left out"] += 1
        entries = [entry for i, entry in enumerate(entries) if i not in groups]
        table = _index(path, entries, "categories")
        found, repaired = table.find(raw)
    repairs["'category_id'"] += repaired
    names: dict[str, Any] = {}
    for entry in entries:
        if entry["name"] in names:
            raise ValueError(
                f"{path}: the categories with the ids {names[entry['name']]!r} and "
                f"{entry['id']!r} have the same name {entry['name']!r}. Rename or merge them"
            )
        names[entry["name"]] = entry["id"]
    return entries, table, raw, found


def _is_group(entries: Sequence[dict[str, Any]], index: int) -> bool:
    """Whether a category is named only as the super-category of others."""
    entry = entries[index]
    parent = entry.get("supercategory") or ""
    is_root = parent == entry["name"] or str(parent).strip().lower() in _NO_GROUP
    return is_root and any(
        other.get("supercategory") == entry["name"] for other in entries if other is not entry
    )


def _repair_file_names(
    images: Sequence[dict[str, Any]], image_root: str, repairs: Counter[str]
) -> None:
    """Take a form of the file name that exists instead of one that does not."""
    for image in images:
        name = image["file_name"]
        if "://" in name or not ("\\" in name or "%" in name):
            continue
        slashes = name.replace("\\", "/")
        for other in (name, slashes, unquote(name), unquote(slashes)):
            if os.path.exists(os.path.join(image_root, other)):
                if other != name:
                    image["file_name"] = other
                    repairs["'file_name'"] += 1
                break


def _masks(
    records: Sequence[dict[str, Any]], annotations: Annotations, repairs: Counter[str]
) -> list[Any]:
    """The masks of the annotations; None for those without one."""
    masks: list[Any] = []
    for record, image in zip(records, annotations.image.tolist(), strict=True):
        value = record.get("segmentation")
        width, height = annotations.sizes[image].astype(int).tolist() if image >= 0 else (0, 0)
        masks.append(normalise_mask(value, (width, height)))
        is_runs = isinstance(masks[-1], dict)
        repairs["'segmentation'"] += masks[-1] not in (None, value) and not is_runs
    return masks


def _areas(
    records: Sequence[dict[str, Any]], boxes: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, int]:
    """Areas, computed from the boxes (xywh) where the file has none that is possible.

    Args:
        records: entries of the file.
        boxes: (A, 4) xywh.
        sizes: (A, 2) width and height of each annotation's image.

    Returns:
        (A) float64 square pixels; and how many were computed.
    """
    values = [record.get("area") for record in records]
    written = np.array([type(value) in (int, float) for value in values], dtype=bool)
    areas = np.array([to_number(value) for value in values], dtype=np.float64)
    possible = (areas > 0) & (areas <= np.maximum(sizes[:, 0] * sizes[:, 1], 1))
    with np.errstate(over="ignore", invalid="ignore"):
        areas = np.where(possible, areas, boxes[:, 2] * boxes[:, 3])
    has_box = (boxes[:, 2:] > 0).all(axis=1)
    return areas, int((~(possible & written) & has_box).sum())
