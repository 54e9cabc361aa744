"""Labelled data of any known kind as two COCO JSON files."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from miti_detr.data.coco.structure import read_coco_json
from miti_detr.files import write_text

from .layouts import Found, Read, image_root
from .record import LabelledImage

logger = logging.getLogger(__name__)

VALIDATION_SHARE = 0.2  # of the images, where there is no validation part
Part = tuple[str, str]  # JSON file and folder of the images


def write_coco_files(found: Found, folder: Path, *, seed: int = 0) -> dict[str, Part]:
    """Convert data, unless that is done, and divide them if they have no validation part.

    COCO JSON files that have both parts are used where they are.

    Args:
        found: the data.
        folder: for the files; nothing is written anywhere else.
        seed: of the division.

    Returns:
        The files of ``train`` and ``val``.

    Raises:
        ValueError: a label is faulty, or there are too few images.
        OSError: a file cannot be read.
    """
    if isinstance(found.train, Path) and isinstance(found.val, Path):
        files = {"train": found.train, "val": found.val}
        return {part: (str(file), str(image_root(file))) for part, file in files.items()}
    record, state = folder / "source.json", _state(found, seed)
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    written = {part: folder / f"{part}.json" for part in ("train", "val")}
    if kept.get("state") != state or not all(file.is_file() for file in written.values()):
        contents, root = _contents(found, seed)
        for part, file in written.items():
            write_text(file, json.dumps(contents[part]))
        write_text(record, json.dumps({"state": state, "root": str(root)}))
    root = json.loads(record.read_text(encoding="utf-8"))["root"]
    return {part: (str(file), root) for part, file in written.items()}


def _state(found: Found, seed: int) -> str:
    """Digest of the files that the result depends on."""
    statuses = [(str(file), os.stat(file)) for file in found.labels]
    parts = [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]
    return hashlib.sha256(repr((found.kind, seed, parts)).encode()).hexdigest()


def _contents(found: Found, seed: int) -> tuple[dict[str, dict[str, Any]], Path]:
    if isinstance(found.train, Path):
        return _divided(read_coco_json(found.train), seed), image_root(found.train)
    train = found.train()
    logger.info("%s: %d images with labels in %s", found.root, len(train), found.kind)
    val = _read(found.val)
    classes = found.classes or _classes([*train, *(val or [])])
    whole = _to_coco(train, classes, found.root)
    if val is None:
        return _divided(whole, seed), found.root
    return {"train": whole, "val": _to_coco(val, classes, found.root)}, found.root


def _read(val: Path | Read | None) -> list[LabelledImage] | None:
    return None if val is None or isinstance(val, Path) else val()


def _classes(images: list[LabelledImage]) -> tuple[str, ...]:
    return tuple(sorted({each["category"] for image in images for each in image.objects}))


def _to_coco(images: list[LabelledImage], classes: tuple[str, ...], root: Path) -> dict[str, Any]:
    ids = {name: index for index, name in enumerate(classes, start=1)}
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, start=1):
        name = os.path.relpath(image.path, root)
        width, height = image.size
        records.append({"id": number, "file_name": name, "width": width, "height": height})
        for each in image.objects:
            category = {"image_id": number, "category_id": ids[each["category"]]}
            rest = {key: value for key, value in each.items() if key != "category"}
            annotations.append({"id": len(annotations) + 1, **category, **rest})
    categories = [{"id": index, "name": name} for name, index in ids.items()]
    return {"images": records, "annotations": annotations, "categories": categories}


def _divided(content: dict[str, Any], seed: int) -> dict[str, dict[str, Any]]:
    """Take a random part of the images for validation."""
    images = content["images"]
    if len(images) < 2:
        raise ValueError(f"there are {len(images)} images; a training needs at least 2")
    count = max(1, round(VALIDATION_SHARE * len(images)))
    chosen = set(np.random.default_rng(seed).permutation(len(images))[:count].tolist())
    logger.warning(
        "there is no validation part: %d of %d images are taken for it (seed %d)",
        *(count, len(images), seed),
    )
    parts = {}
    for part, wanted in (("train", False), ("val", True)):
        kept = [image for i, image in enumerate(images) if (i in chosen) == wanted]
        ids = {image["id"] for image in kept}
        objects = [each for each in content.get("annotations", []) if each.get("image_id") in ids]
        parts[part] = {**content, "images": kept, "annotations": objects}
    return parts
