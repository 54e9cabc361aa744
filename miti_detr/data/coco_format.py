"""Data sets in COCO format, registered from the config: nothing to code for one's own data."""

import json
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from miti_detr.files import write_text

from .annotations import annotations_of_coco, count_faults, read_coco_json

logger = logging.getLogger(__name__)

BAD_ANNOTATIONS = ("error", "drop")


def register_coco_format(cfg: CfgNode) -> None:
    """Register the data sets of ``DATASETS.COCO_FORMAT`` with Detectron2.

    Each entry is ``[name, annotation json, image folder]``; relative paths start at the working
    directory. In a YAML::

        DATASETS:
          COCO_FORMAT:
            - [cells_train, /data/cells/train.json, /data/cells/images]

    and as an override::

        DATASETS.COCO_FORMAT "[['cells_train', '/data/cells/train.json', '/data/cells/images']]"

    Nothing is read yet. The categories become the classes 0..K-1 in the order of their ids. With
    ``DATASETS.BAD_ANNOTATIONS drop``, a copy of the JSON without its faulty annotations is written
    below ``OUTPUT_DIR`` when the data set is first loaded, and everything (loader, evaluator) reads
    that copy.

    Args:
        cfg: every process calls this with the same config. Calling it again with the same entries
            changes nothing.

    Raises:
        ValueError: if an entry is no such triple, or its name is already that of another data set.
    """
    check_bad_annotations_key(cfg)
    for entry in cfg.DATASETS.COCO_FORMAT:
        if is_entry(entry, 2) and not entry[1].endswith(".json"):
            continue  # images without labels: register_unlabeled
        if not is_entry(entry, 3):
            raise ValueError(
                "DATASETS.COCO_FORMAT must be a list of [name, annotation json, image folder], "
                "or [name, image folder] for images without labels, "
                f"such as \"[['name','train.json','images']]\"; got the entry {entry!r}"
            )
        name, json_file, image_root = entry[0], *(os.path.expanduser(path) for path in entry[1:])
        source = (os.path.abspath(json_file), os.path.abspath(image_root))
        forget_earlier("DATASETS.COCO_FORMAT", name, source)
        prepare: Callable[[], None] | None = None
        if cfg.DATASETS.BAD_ANNOTATIONS == "drop":
            clean = os.path.join(cfg.OUTPUT_DIR, "clean_annotations", f"{name}.json")
            prepare = cache(partial(write_clean_json, json_file, clean))  # once in each process
            json_file = clean
        register_coco(name, json_file, image_root, prepare=prepare, coco_format=source)


def register_coco(
    name: str,
    json_file: str,
    image_root: str,
    prepare: Callable[[], None] | None = None,
    **metadata: Any,
) -> None:
    """Register a data set in COCO format whose files may be made on first use.

    Like Detectron2's ``register_coco_instances``, with the key ``prepare`` in the metadata: what is
    to be called before anything reads ``json_file``.

    Args:
        name: the name in the catalogs.
        json_file: annotations in COCO format.
        image_root: folder of the images.
        prepare: makes the files unless they are there; safe to call often and from several
            processes.
        metadata: further keys of the metadata.
    """

    def load_dicts() -> list[dict[str, Any]]:
        """What the catalog calls."""
        prepare_files(name)
        return load_coco_json(json_file, image_root, name)

    DatasetCatalog.register(name, load_dicts)
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        prepare=prepare,
        **metadata,
    )


def prepare_files(name: str) -> None:
    """Make the files of a registered data set, if they are made on first use."""
    prepare = MetadataCatalog.get(name).get("prepare")
    if prepare is not None:
        prepare()


def write_clean_json(source: str, target: str) -> None:
    """Copy a COCO-format file without its faulty annotations, and log how many were dropped.

    Args:
        source: the original.
        target: the copy; its folder is made.

    Raises:
        FileNotFoundError, ValueError: see :func:`~miti_detr.data.annotations.read_coco_json`.
    """
    content = read_coco_json(source)
    faults = annotations_of_coco(content, source).faults()
    dropped = int((faults >= 0).sum())
    if dropped:
        counts = count_faults(faults)
        logger.warning("%s: dropped %d of %d annotations: %s", source, dropped, len(faults), counts)
        records = zip(content["annotations"], faults.tolist(), strict=True)
        content["annotations"] = [record for record, fault in records if fault < 0]
    write_text(target, json.dumps(content))  # every process writes the same


def check_bad_annotations_key(cfg: CfgNode) -> None:
    """Raise ValueError unless ``DATASETS.BAD_ANNOTATIONS`` is one of its values."""
    if cfg.DATASETS.BAD_ANNOTATIONS not in BAD_ANNOTATIONS:
        raise ValueError(
            f"DATASETS.BAD_ANNOTATIONS must be one of {BAD_ANNOTATIONS}, "
            f"got {cfg.DATASETS.BAD_ANNOTATIONS!r}"
        )


def is_entry(entry: Any, length: int) -> bool:
    """Whether an entry of a config is that many texts, none of them empty."""
    return (
        isinstance(entry, list | tuple)
        and len(entry) == length
        and all(isinstance(part, str) and part for part in entry)
    )


def forget_earlier(key: str, name: str, source: tuple[str, str]) -> None:
    """Unregister what an earlier call registered under a name, from the same paths.

    Args:
        key: of the config, for the error.
        name: of the data set.
        source: its annotation file ("" if it has none) and its image folder.

    Raises:
        ValueError: the name is that of another data set.
    """
    if name not in DatasetCatalog:
        return
    metadata = MetadataCatalog.get(name)
    known = metadata.get("coco_format")
    if known != source:
        known = known or (metadata.get("json_file"), metadata.get("image_root"))
        raise ValueError(
            f"{key}: the name {name!r} with {source} is already that of a data set "
            f"with {known}: choose another name"
        )
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
