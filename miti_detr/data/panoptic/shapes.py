"""The built-in data set ``shapes_panoptic``: the images of ``shapes``, each pixel in a segment.

Shapes are things, of which the visible pixels count. The background is one segment of stuff, whose
class is its texture.
"""

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miti_detr.data.object_masks import ids_to_colours
from miti_detr.data.shapes import FIRST_SEED, make_once, render_shapes
from miti_detr.data.shapes_render import CLASSES, TEXTURES, render_segments

from .source import register_panoptic

logger = logging.getLogger(__name__)


def render_shapes_panoptic(folder: str | Path, shapes: str | Path) -> None:
    """Write ``{train,val}.json`` and ``{train,val}/000001.png``, ... unless they exist.

    Args:
        folder: of the data set; it appears whole or not at all.
        shapes: folder of the data set ``shapes``, which is rendered first if it does not exist.

    Raises:
        OSError: as for :func:`~miti_detr.data.render_shapes`.
    """
    render_shapes(shapes)

    def write(partial_folder: Path) -> None:
        """Write both splits."""
        for split in FIRST_SEED:
            _write_split(partial_folder, Path(shapes), split)

    make_once(Path(folder), "shapes_panoptic", write)


def register_shapes_panoptic(root: str) -> None:
    """Register ``shapes_panoptic_train`` and ``shapes_panoptic_val``, rendered when first loaded.

    Args:
        root: folder of Detectron2's data sets.
    """
    shapes, folder = (os.path.join(root, name) for name in ("shapes", "shapes_panoptic"))
    for split in FIRST_SEED:
        register_panoptic(
            f"shapes_panoptic_{split}",
            os.path.join(folder, f"{split}.json"),
            os.path.join(shapes, split),
            os.path.join(folder, split),
            prepare=partial(render_shapes_panoptic, folder, shapes),
            json_file=os.path.join(shapes, f"{split}.json"),
        )


def _write_split(folder: Path, shapes: Path, split: str) -> None:
    (folder / split).mkdir(parents=True)
    images = json.loads((shapes / f"{split}.json").read_text())["images"]
    logger.info("Rendering the segments of shapes_panoptic_%s: %d images", split, len(images))
    names = (*CLASSES, *TEXTURES)
    content = {
        "info": {"description": f"shapes_panoptic_{split}: shapes, and textures of the background"},
        "licenses": [],
        "images": images,
        "annotations": [_write_image(folder / split, split, image) for image in images],
        "categories": [
            {"id": i, "name": name, "isthing": int(name in CLASSES)}
            for i, name in enumerate(names, start=1)
        ],
    }
    (folder / f"{split}.json").write_text(json.dumps(content, separators=(",", ":")))


def _write_image(folder: Path, split: str, image: dict[str, Any]) -> dict[str, Any]:
    """Write the segment ids of an image: 1..T for shapes, T + 1 for the background."""
    owner, labels, texture = render_segments(FIRST_SEED[split] + image["id"] - 1)
    ids = np.where(owner == 0, len(labels) + 1, owner)
    Image.fromarray(ids_to_colours(ids)).save(folder / image["file_name"], optimize=True)
    segments = []
    for number, label in enumerate([*labels, len(CLASSES) + texture], start=1):
        rows, columns = np.nonzero(ids == number)
        x, y = int(columns.min()), int(rows.min())
        segments.append(
            {
                "id": number,
                "category_id": label + 1,
                "iscrowd": 0,
                "area": len(rows),
                "bbox": [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1],
            }
        )
    return {"image_id": image["id"], "file_name": image["file_name"], "segments_info": segments}
