"""Checks of the data before a run starts, so that faults are reported at once, not after hours."""

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from tabulate import tabulate

from miti_detr.class_count import OWN_KEY, classes_key, num_classes

from .coco.annotations import FATAL_FAULTS, FAULTS, Annotations, annotations_of_dicts, summarise
from .coco.coco_file import CocoFile
from .coco.structure import to_number
from .coco_format import CocoSource, check_bad_annotations_key, coco_source, describe_repairs
from .images import ImageError, check_size, find_faults, image_size
from .loader import get_bad_images
from .mapper import get_orientation
from .panoptic.check import check_panoptic
from .unlabeled import check_unlabeled

logger = logging.getLogger(__name__)


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Check the data sets of a config, and log the mapping of their classes.

    Every process calls this. The main one looks at the data, and all of them raise what it found.
    What is checked:

    - the data sets are registered, their JSON files can be read and, if necessary, repaired, and
      their image files exist, are images, and have the size that is given for them.
      ``DATASETS.BAD_IMAGES`` says whether faulty images stop the run (``error``) or are skipped;
    - annotations: see :data:`miti_detr.data.coco.annotations.FAULTS`.
      ``DATASETS.BAD_ANNOTATIONS`` says whether faulty ones stop the run (``error``) or are dropped
      (``drop``);
    - the training data have at least one object;
    - all data sets have the same classes, as many as the model;
    - a warning where a training image has more objects than there are object queries.

    Of data sets for pre-training (``INPUT.PATCHES.NUMBER``) only the images are checked.

    Args:
        cfg: after :func:`~miti_detr.data.register_coco_format`.
        eval_only: check only ``DATASETS.TEST``.

    Raises:
        ValueError: with the file, the annotation and the image, or the two numbers and the override
            to type.
        OSError: an annotation file or an image is missing or cannot be read.
    """
    error: Exception | None = None
    if comm.is_main_process():
        try:
            _check_on_main_process(cfg, eval_only)
        except Exception as e:  # must reach the other processes, which would wait for it
            error = e
    first_error = comm.all_gather(error)[0] if comm.get_world_size() > 1 else error
    if first_error is not None:
        raise first_error


@dataclass(frozen=True)
class _DataSet:
    """What is checked of a registered data set. Classes are empty if it does not name them."""

    name: str
    annotations: Annotations
    classes: tuple[str, ...]
    class_ids: tuple[Any, ...]


def _check_on_main_process(cfg: CfgNode, eval_only: bool) -> None:
    check_bad_annotations_key(cfg)
    train, test = (() if eval_only else tuple(cfg.DATASETS.TRAIN)), tuple(cfg.DATASETS.TEST)
    if not (test if eval_only else train):
        raise ValueError(
            f"DATASETS.{'TEST' if eval_only else 'TRAIN'} is empty. Name a registered data set"
        )
    if cfg.INPUT.PATCHES.NUMBER > 0:
        check_unlabeled(list(dict.fromkeys((*train, *test))))
        return
    reference: _DataSet | None = None
    objects = 0 if train else 1
    for name in dict.fromkeys((*train, *test)):
        if name in DatasetCatalog and MetadataCatalog.get(name).get("panoptic_json"):
            objects += check_panoptic(cfg, name, _check_images)
            continue
        data = _read(cfg, name, trained=name in train, tested=name in test)
        if data is None:
            logger.info("%s is not a list of dicts, so its annotations are not checked", name)
            objects += 1
            continue
        _check_faults(cfg, name, data.annotations)
        if data.classes:
            _check_classes(cfg, data, reference or data)
            reference = reference or data
        if name in train:
            objects += int(data.annotations.usable().sum())
            _warn_of_too_many_objects(cfg, data)
        _log_classes(data)
    if objects == 0:
        raise ValueError(
            f"The training data {', '.join(train)} have no object: there are no annotations, or "
            "all of them are crowds ('iscrowd': 1), which are not trained on. Correct the "
            "annotation file, or DATASETS.TRAIN"
        )


def _read(cfg: CfgNode, name: str, *, trained: bool, tested: bool) -> _DataSet | None:
    """The annotations of a data set, or None if it is a torch data set."""
    if name not in DatasetCatalog:
        raise ValueError(
            f"The data set {name!r} is not registered: correct DATASETS.TRAIN or DATASETS.TEST, "
            "or add [name, annotation json, image folder] to DATASETS.COCO_FORMAT"
        )
    metadata = MetadataCatalog.get(name)
    source = coco_source(name)
    if source is not None:
        return _of_file(cfg, name, source, source.read(), trained)
    if metadata.get("evaluator_type") == "coco" and metadata.get("json_file") is not None:
        folder, masks = metadata.image_root, cfg.MODEL.MASK_ON
        source = CocoSource(
            name, metadata.json_file, folder, copy="", drop_faulty=True, with_masks=masks
        )
        file = source.read()
        _check_repairs(name, file, tested=tested)
        return _of_file(cfg, name, source, file, trained)
    dicts = DatasetCatalog.get(name)
    if not isinstance(dicts, list):
        return None
    _check_dicts(name, dicts, tested=tested)
    files = [{**d, "file_name": os.fspath(d["file_name"])} for d in dicts]
    _check_images(cfg, f"data set {name}", files)
    names = tuple(metadata.get("thing_classes", ()))
    classes = len(names) or num_classes(cfg)
    annotations = annotations_of_dicts(
        dicts, f"data set {name}", classes, with_masks=cfg.MODEL.MASK_ON
    )
    return _DataSet(name, annotations, names, tuple(range(len(names))))


def _check_dicts(name: str, dicts: list[Any], *, tested: bool) -> None:
    """Check the structure of what a user's own function returns."""
    for i, record in enumerate(dicts):
        if not isinstance(record, dict):
            raise ValueError(f"data set {name}: record {i} is not a dict: {record!r:.100}")
        if not isinstance(record.get("file_name"), str | os.PathLike):
            raise ValueError(
                f"data set {name}: record {i} has the 'file_name' {record.get('file_name')!r:.50}. "
                "It must be the name of a file"
            )
        for field in ("width", "height"):
            value = record.get(field, None if tested else 1)
            if not isinstance(value, Real) or not 1 <= to_number(value) < 1e9:
                raise ValueError(
                    f"data set {name}: record {i} has the '{field}' {value!r:.50}. It must be a "
                    "positive number of pixels"
                )
        objects = record.get("annotations", [])
        if not isinstance(objects, Sequence) or not all(isinstance(a, dict) for a in objects):
            raise ValueError(
                f"data set {name}: the 'annotations' of record {i} are not a list of dicts"
            )
    ids = [record.get("image_id", i) for i, record in enumerate(dicts)]
    if tested and (set(map(type, ids)) not in ({int}, {str}) or len(set(ids)) < len(ids)):
        raise ValueError(
            f"data set {name}: for evaluation, all 'image_id' must be different integers, or all "
            "of them different texts"
        )


def _of_file(
    cfg: CfgNode, name: str, source: CocoSource, file: CocoFile, trained: bool
) -> _DataSet:
    for key, entries in (("images", file.images), ("categories", file.classes)):
        if not entries:
            raise ValueError(f"{source.source}: the list '{key}' is empty")
    if trained and not file.is_annotated:
        raise ValueError(f"{source.source} has no 'annotations', so it cannot be trained on")
    root = source.image_root
    images = [{**i, "file_name": os.path.join(root, i["file_name"])} for i in file.images]
    _check_images(cfg, source.source, images)
    names, ids = tuple(file.classes), tuple(file.original_category_ids)
    return _DataSet(name, file.annotations, names, ids)


def _check_repairs(name: str, file: CocoFile, *, tested: bool) -> None:
    """Refuse what Detectron2's own loader and evaluator, which repair nothing, would get wrong."""
    harmless = () if tested else ("annotation 'id'", "'area'", "'ignore'")
    needed = [what for what in file.repairs if what not in harmless]
    missing_crowds = not tested and all(r.get("iscrowd", 0) == 0 for r in file.records)
    if needed == ["'iscrowd'"] and missing_crowds:
        needed = []
    dropped = sum(map(_is_dropped_by_detectron2, file.records))
    if not needed and not dropped:
        return
    found = describe_repairs(file)
    if dropped:
        found += f"{', ' if found else ''}{dropped} x 'segmentation' without a polygon"
    raise ValueError(
        f"{file.path} needs repairs ({found}), but the data set {name!r} is read by Detectron2, "
        "which makes none. Register it with DATASETS.COCO_FORMAT instead, or correct the file"
    )


def _is_dropped_by_detectron2(record: Mapping[str, Any]) -> bool:
    """Whether Detectron2's loader drops an annotation, or stops, because of its segmentation."""
    polygons = record.get("segmentation")
    if not polygons or isinstance(polygons, dict):
        return False
    return not isinstance(polygons, list) or not any(
        isinstance(p, list) and len(p) % 2 == 0 and len(p) >= 6 for p in polygons
    )


def _check_images(cfg: CfgNode, source: str, images: Sequence[Mapping[str, Any]]) -> None:
    """Check that image files exist, by one listing per folder, and then their headers."""
    orientation, skip = get_orientation(cfg), get_bad_images(cfg) == "skip"
    local = [i for i in images if "://" not in i["file_name"]]  # others: Detectron2's PathManager
    names_of: dict[str, list[str]] = defaultdict(list)
    for image in local:
        folder, name = os.path.split(image["file_name"])
        names_of[folder].append(name)
    missing: set[str] = set()
    for folder, names in names_of.items():
        present = set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
        missing |= {os.path.join(folder, name) for name in names if name not in present}
    if missing and not skip:
        first = next(i["file_name"] for i in local if i["file_name"] in missing)
        listed = _first([first], len(missing))
        raise FileNotFoundError(f"{source} names images that do not exist: {listed}")

    def fault(image: Mapping[str, Any]) -> str:
        """What the header of an image file shows to be wrong, or ""."""
        try:
            size = image_size(image["file_name"], orientation)
            check_size(dict(image), size, orientation)
        except ImageError as error:
            return str(error)
        return ""

    faults, checked = find_faults(local, fault)
    if faults and not skip:
        raise ValueError(f"{source}: {_first(faults, len(faults))}")
    if faults and len(faults) == checked:
        raise ValueError(f"{source} has no image that can be used: {faults[0]}")
    if faults:
        logger.warning(
            "%s: %d of %d images checked will be skipped (in evaluation, their objects count as "
            "missed). The first: %s",
            source,
            len(faults),
            checked,
            faults[0],
        )


def _first(items: Sequence[str], count: int) -> str:
    return items[0] + (f" (and {count - 1} more images)" if count > 1 else "")


def _check_faults(cfg: CfgNode, name: str, annotations: Annotations) -> None:
    faults = annotations.faults()
    bad = np.flatnonzero(faults >= 0)
    if not len(bad):
        _check_pixel_units(annotations)
        return
    advice = "correct them, or drop them with the override DATASETS.BAD_ANNOTATIONS drop"
    if cfg.DATASETS.BAD_ANNOTATIONS == "drop":
        if coco_source(name) is not None:  # its loader drops them, and has logged it
            return
        if not np.isin(faults, [FAULTS.index(fault) for fault in FATAL_FAULTS]).any():
            logger.warning("%s: %s. They are dropped", annotations.source, summarise(faults))
            return
        advice = "such ones can only be dropped from data sets that DATASETS.COCO_FORMAT registers"
    raise ValueError(annotations.report(faults, advice))


def _check_pixel_units(annotations: Annotations) -> None:
    """Boxes that were divided by the size of the image are all within the first pixel."""
    if len(annotations.boxes) and annotations.boxes.max() <= 1:
        raise ValueError(
            f"{annotations.source}: all boxes lie within [0, 1], as if they were relative to the "
            "size of the image. Boxes in COCO format are [x, y, width, height] in pixels"
        )


def _check_classes(cfg: CfgNode, data: _DataSet, reference: _DataSet) -> None:
    if data.classes != reference.classes:
        raise ValueError(
            f"The classes of {data.name} differ from those of {reference.name}: "
            f"{list(data.classes)} against {list(reference.classes)}. Give both annotation files "
            "the same categories, in the same order of their ids"
        )
    key, count = classes_key(cfg), len(data.classes)
    if count != num_classes(cfg):
        raise ValueError(
            f"{data.name} has {count} classes, but {key} is {num_classes(cfg)}. Add the override "
            f"{key} {count}"
        )


def _warn_of_too_many_objects(cfg: CfgNode, data: _DataSet) -> None:
    objects = data.annotations.objects_per_image()
    limit = cfg.MODEL.DETR.NUM_OBJECT_QUERIES
    if classes_key(cfg) == OWN_KEY and (objects > limit).any():
        worst = int(objects.argmax())
        logger.warning(
            "%s: %d of %d images have more objects than MODEL.DETR.NUM_OBJECT_QUERIES %d "
            "(image %s: %d); the remaining objects cannot be detected",
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
    sound = annotations.usable()
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
