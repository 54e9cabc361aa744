"""The built-in data set ``shapes``: deterministic pictures in COCO format, rendered on first use.

Boxes, areas and polygons describe the whole shape, even if a later shape covers a part of it. All
numbers in the JSON files are multiples of a quarter pixel (areas: of 1/32 square pixel), so they
are exact.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from iopath.common.file_io import file_lock

from .coco_format import register_coco
from .shapes_render import CLASSES, Shape, encode_png, image_size, render

logger = logging.getLogger(__name__)

NUM_TRAIN = 2000
NUM_VAL = 300
FIRST_SEED = {"train": 0, "val": 1_000_000_000}
_LOG_EVERY = 500  # images


def render_shapes(folder: str | Path, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL) -> None:
    """Write ``{train,val}.json`` and ``{train,val}/000001.png``, ... unless they exist.

    The folder appears whole or not at all. Several processes may call this at once: one renders,
    the others wait.

    Args:
        folder: of the data set; made together with its parents.
        num_train: number of training images.
        num_val: number of validation images.

    Raises:
        OSError: the disk has too little room; with the needed and the free size.
        FileExistsError: the folder holds something else.
    """
    counts = {"train": num_train, "val": num_val}

    def write(partial_folder: Path) -> None:
        """Write both splits."""
        _check_disk(partial_folder, counts)
        for split, count in counts.items():
            _write_split(partial_folder, split, count)

    make_once(Path(folder), "shapes", write)


def make_once(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    """Make the folder of a built-in data set, unless it exists; it appears whole or not at all.

    Args:
        folder: complete if it has ``train.json`` and ``val.json``.
        name: of the data set, for messages.
        write: called with the folder to fill, which does not exist.

    Raises:
        FileExistsError: the folder holds something else.
    """
    if _is_complete(folder):  # before the lock: the folder may be read-only
        return
    with file_lock(os.path.abspath(folder)):
        if _is_complete(folder):
            return
        if folder.exists():
            raise FileExistsError(f"{folder} is not the data set {name!r}. Move it away")
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)  # left by a run that was killed
        write(partial_folder)
        os.replace(partial_folder, folder)
    logger.info("The data set %r is in %s", name, folder)


def register_shapes(root: str) -> None:
    """Register ``shapes_train`` and ``shapes_val``; they are rendered when first loaded.

    Args:
        root: folder of Detectron2's data sets; the data set goes to ``shapes`` inside it.
    """
    folder = os.path.join(root, "shapes")
    for split in FIRST_SEED:
        register_coco(
            f"shapes_{split}",
            os.path.join(folder, f"{split}.json"),
            os.path.join(folder, split),
            with_masks=True,
            prepare=partial(render_shapes, folder),
            thing_classes=list(CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(CLASSES))},
        )


def _is_complete(folder: Path) -> bool:
    return all((folder / f"{split}.json").is_file() for split in FIRST_SEED)


def _check_disk(folder: Path, counts: dict[str, int]) -> None:
    needed = 0
    for split, count in counts.items():
        for i in range(count):
            height, width = image_size(FIRST_SEED[split] + i)
            needed += 3 * height * width + 4096  # headers, annotations, rounding to blocks
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(
            f"The data set 'shapes' needs {needed / 1e6:.1f} MB in {folder.parent}, where "
            f"{free / 1e6:.1f} MB are free. Make room, or point the environment variable "
            "DETECTRON2_DATASETS to another disk"
        )


def _write_split(folder: Path, split: str, count: int) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        if i % _LOG_EVERY == 0:
            logger.info("Rendering shapes_%s: %d of %d images", split, i, count)
        pixels, shapes = render(FIRST_SEED[split] + i)
        name = f"{i + 1:06d}.png"
        (folder / split / name).write_bytes(encode_png(pixels))
        height, width = pixels.shape[:2]
        images.append({"id": i + 1, "file_name": name, "width": width, "height": height})
        for shape in shapes:
            annotations.append(_annotation(shape, len(annotations) + 1, image_id=i + 1))
    content = {
        "info": {"description": f"shapes_{split}: rendered circles, squares and triangles"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
    }
    (folder / f"{split}.json").write_text(json.dumps(content, separators=(",", ":")))


def _annotation(shape: Shape, annotation_id: int, image_id: int) -> dict[str, Any]:
    """The COCO annotation of a shape, in pixels of the image."""
    x, y = shape.polygon.T
    left, top, right, bottom = x.min(), y.min(), x.max(), y.max()
    twice_area = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum()  # in 1/16 square pixels
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": shape.label + 1,
        "bbox": [int(v) / 4 for v in (left, top, right - left, bottom - top)],
        "area": int(twice_area) / 32,
        "iscrowd": 0,
        "segmentation": [[int(v) / 4 for v in shape.polygon.ravel()]],
    }
