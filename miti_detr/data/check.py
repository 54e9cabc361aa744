"""Checks of the data before a run starts: faults are named at once, not after hours."""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from PIL import Image
from tabulate import tabulate

from .annotations import (
    FATAL_FAULTS,
    FAULTS,
    Annotations,
    annotations_of_coco,
    annotations_of_dicts,
    count_faults,
    read_coco_json,
)
from .coco_format import check_bad_annotations_key, prepare_files
from .headers import find_faults
from .unlabeled import check_unlabeled

logger = logging.getLogger(__name__)

_MAX_LISTED = 10
_EXIF_ORIENTATION = 0x0112


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Check the data sets of a config, and log the mapping of their classes.

    Every process calls this; the main one looks at the data, and all of them raise what it found.
    What is checked:

    - the data sets are registered, their JSON files can be read, and their image files exist, are
      images, and have the size that is given for them;
    - annotations: see :data:`miti_detr.data.annotations.FAULTS`. ``DATASETS.BAD_ANNOTATIONS`` says
      whether faulty ones stop the run (``error``) or are dropped (``drop``: the counts are logged);
    - all data sets have the same classes, as many as ``MODEL.DETR.NUM_CLASSES``;
    - a warning where a training image has more objects than there are object queries.

    Of data sets for pre-training (``INPUT.PATCHES.NUMBER``) only the images are looked at.

    Args:
        cfg: after :func:`~miti_detr.data.register_coco_format`.
        eval_only: check ``DATASETS.TEST`` alone.

    Raises:
        ValueError: with the file, the annotation and the image, or the two numbers and the override
            to type.
        FileNotFoundError: if an annotation file or an image is missing.
    """
    error: Exception | None = None
    if comm.is_main_process():
        try:
            _check_on_main_process(cfg, eval_only)
        except Exception as e:  # must reach the others, which would wait for ever
            error = e
    first_error = comm.all_gather(error)[0] if comm.get_world_size() > 1 else error
    if first_error is not None:
        raise first_error


@dataclass(frozen=True)
class _DataSet:
    """What is checked of a registered data set: classes are empty if it does not name them."""

    name: str
    annotations: Annotations
    classes: tuple[str, ...]
    class_ids: tuple[Any, ...]


def _check_on_main_process(cfg: CfgNode, eval_only: bool) -> None:
    check_bad_annotations_key(cfg)
    train, test = (() if eval_only else tuple(cfg.DATASETS.TRAIN)), tuple(cfg.DATASETS.TEST)
    if not (test if eval_only else train):
        raise ValueError(
            f"DATASETS.{'TEST' if eval_only else 'TRAIN'} is empty: name a registered data set"
        )
    if cfg.INPUT.PATCHES.NUMBER > 0:
        check_unlabeled(list(dict.fromkeys((*train, *test))))
        return
    reference: _DataSet | None = None
    for name in dict.fromkeys((*train, *test)):
        data = _read(cfg, name, trained=name in train, tested=name in test)
        if data is None:
            logger.info("%s is not a list of dicts: its annotations are not checked", name)
            continue
        _check_faults(cfg, data.annotations)
        if data.classes:
            _check_classes(cfg, data, reference or data)
            reference = reference or data
        if name in train:
            _warn_of_too_many_objects(cfg, data)
        _log_classes(data)


def _read(cfg: CfgNode, name: str, *, trained: bool, tested: bool) -> _DataSet | None:
    """The annotations of a data set, or None if it is a torch data set."""
    if name not in DatasetCatalog:
        raise ValueError(
            f"The data set {name!r} is not registered: correct DATASETS.TRAIN or DATASETS.TEST, "
            "or add [name, annotation json, image folder] to DATASETS.COCO_FORMAT"
        )
    prepare_files(name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") == "coco" and metadata.get("json_file") is not None:
        json_file, content = metadata.json_file, read_coco_json(metadata.json_file)
        _check_fields(json_file, content, trained=trained, tested=tested)
        root, source = metadata.image_root, metadata.get("coco_format", (json_file,))[0]
        images = [{**i, "file_name": os.path.join(root, i["file_name"])} for i in content["images"]]
        _check_images(source, images)  # not of the cleaned copy
        categories = sorted(content["categories"], key=lambda c: c["id"])
        names, ids = (tuple(c[key] for c in categories) for key in ("name", "id"))
        return _DataSet(name, annotations_of_coco(content, json_file), names, ids)
    dicts = DatasetCatalog.get(name)
    if not isinstance(dicts, list):
        return None
    _check_images(f"data set {name}", [d for d in dicts if "file_name" in d])
    names = tuple(metadata.get("thing_classes", ()))
    num_classes = len(names) or cfg.MODEL.DETR.NUM_CLASSES
    annotations = annotations_of_dicts(dicts, f"data set {name}", num_classes)
    return _DataSet(name, annotations, names, tuple(range(len(names))))


def _check_fields(json_file: str, content: dict[str, Any], *, trained: bool, tested: bool) -> None:
    """What training and COCO's evaluation need beyond the structure of the file."""
    if "annotations" not in content:
        if trained:
            raise ValueError(f"{json_file} has no 'annotations', so nothing can be learnt from it")
        return
    for field in ("area", "iscrowd") if tested else ():
        missing = [a["id"] for a in content["annotations"] if field not in a]
        if missing:
            raise ValueError(
                f"{json_file}: {len(missing)} annotations (the first: {missing[0]}) have no "
                f"{field!r}, which COCO's evaluation needs: add 'iscrowd': 0 and the 'area' in "
                "square pixels (width times height of the box will do)"
            )


def _check_images(source: str, images: Sequence[Mapping[str, Any]]) -> None:
    """Check that image files exist, by one listing per folder, and then their sizes."""
    local = [i for i in images if "://" not in i["file_name"]]  # others: Detectron2's PathManager
    names_of: dict[str, list[str]] = defaultdict(list)
    for image in local:
        folder, name = os.path.split(image["file_name"])
        names_of[folder].append(name)
    missing: list[str] = []
    for folder, names in names_of.items():
        present = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        missing += [os.path.join(folder, name) for name in names if name not in present]
    if missing:
        raise FileNotFoundError(f"{source} names images that do not exist: {_first(missing)}")
    faults, _ = find_faults(local, _image_fault)
    if faults:
        raise ValueError(f"{source}: {_first(faults)}")


def _image_fault(image: Mapping[str, Any]) -> str:
    """What the header of an image file shows to be wrong, or ""; as Detectron2 will read it."""
    file = image["file_name"]
    try:
        with Image.open(file) as opened:
            size = opened.size
            # Asked for what it does not have, a PNG would decode its pixels.
            exif = opened.getexif() if "exif" in opened.info else {}
    except Exception as error:  # which ones depends on the decoder
        return f"the image {file} cannot be read ({error})"
    width, height = reversed(size) if exif.get(_EXIF_ORIENTATION, 1) > 4 else size
    given = image.get("width", width), image.get("height", height)
    if given == (width, height):
        return ""
    return (
        f"the image {file} is {width} x {height} pixels, not {given[0]} x {given[1]}: correct one"
    )


def _first(items: list[str]) -> str:
    return items[0] + (f" and {len(items) - 1} more images" if len(items) > 1 else "")


def _check_faults(cfg: CfgNode, annotations: Annotations) -> None:
    faults = annotations.faults()
    bad = np.flatnonzero(faults >= 0)
    if not len(bad):
        _check_pixel_units(annotations)
        return
    fatal = np.isin(faults, [FAULTS.index(fault) for fault in FATAL_FAULTS]).any()
    summary = f"{len(bad)} of {len(faults)} annotations are faulty: {count_faults(faults)}"
    if cfg.DATASETS.BAD_ANNOTATIONS == "drop" and not fatal:
        logger.warning("%s: %s. They are dropped", annotations.source, summary)
        return
    lines = [annotations.describe(i, faults[i]) for i in bad[:_MAX_LISTED]]
    lines += [f"... and {len(bad) - _MAX_LISTED} more"] if len(bad) > _MAX_LISTED else []
    advice = "correct them, or drop them with the override DATASETS.BAD_ANNOTATIONS drop"
    if cfg.DATASETS.BAD_ANNOTATIONS == "drop":
        advice = "such ones can only be dropped from data sets that DATASETS.COCO_FORMAT registers"
    raise ValueError("\n  ".join([f"{annotations.source}: {summary}; {advice}", *lines]))


def _check_pixel_units(annotations: Annotations) -> None:
    """Boxes that were divided by the size of the image are all within the first pixel."""
    if len(annotations.boxes) and annotations.boxes.max() <= 1:
        raise ValueError(
            f"{annotations.source}: all boxes lie within [0, 1], as if they were relative to the "
            "size of the image; boxes in COCO format are [x, y, width, height] in pixels"
        )


def _check_classes(cfg: CfgNode, data: _DataSet, reference: _DataSet) -> None:
    if data.classes != reference.classes:
        raise ValueError(
            f"The classes of {data.name} differ from those of {reference.name}: "
            f"{list(data.classes)} against {list(reference.classes)}; give both annotation files "
            "the same categories, in the same order of their ids"
        )
    if len(data.classes) != cfg.MODEL.DETR.NUM_CLASSES:
        raise ValueError(
            f"{data.name} has {len(data.classes)} classes, but MODEL.DETR.NUM_CLASSES is "
            f"{cfg.MODEL.DETR.NUM_CLASSES}: add the override "
            f"MODEL.DETR.NUM_CLASSES {len(data.classes)}"
        )


def _warn_of_too_many_objects(cfg: CfgNode, data: _DataSet) -> None:
    objects = data.annotations.objects_per_image()
    limit = cfg.MODEL.DETR.NUM_OBJECT_QUERIES
    if (objects > limit).any():
        worst = int(objects.argmax())
        logger.warning(
            "%s: %d of %d images have more objects than MODEL.DETR.NUM_OBJECT_QUERIES %d "
            "(image %s: %d); the objects left over are not learnt",
            data.name,
            (objects > limit).sum(),
            len(objects),
            limit,
            data.annotations.image_names[worst],
            objects[worst],
        )


def _log_classes(data: _DataSet) -> None:
    """Log class, id in the data set, name and number of objects, in up to three columns."""
    annotations = data.annotations
    sound = (annotations.faults() < 0) & ~annotations.crowd
    counts = np.bincount(annotations.category[sound], minlength=len(data.classes))
    cells = [
        (i, dataset_id, name, int(count))
        for i, (dataset_id, name, count) in enumerate(
            zip(data.class_ids, data.classes, counts, strict=False)
        )
    ]
    rows = -(-len(cells) // 3) if len(cells) > 20 else len(cells)
    blocks = [cells[k : k + rows] for k in range(0, len(cells), rows or 1)]
    table = [sum((block[r] for block in blocks if r < len(block)), ()) for r in range(rows)]
    headers = ("class", "id in data", "name", "objects") * len(blocks)
    logger.info(
        "%s: %d images, %d objects\n%s",
        data.name,
        len(annotations.sizes),
        sound.sum(),
        tabulate(table, headers=headers),
    )
