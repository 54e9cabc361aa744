"""Small data sets in COCO format, and configs that use them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from PIL import Image

from miti_detr.config import add_miti_detr_config


def make_cfg(*overrides: Any) -> CfgNode:
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "MitiDetr"
    cfg.merge_from_list(
        ["SEED", 7, "DATALOADER.NUM_WORKERS", 0, "MODEL.DETR.NUM_CLASSES", 2, *overrides]
    )
    return cfg


def annotation(annotation_id: int, image_id: int, **changes: Any) -> dict[str, Any]:
    record = {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 5,
        "bbox": [1.5, 2.0, 10.0, 12.0],
        "area": 120.0,
        "iscrowd": 0,
    }
    record.update(changes)
    return {key: value for key, value in record.items() if value is not None}


def coco_content(
    annotations: list[dict[str, Any]], sizes: tuple[tuple[int, int], ...] = ((20, 30), (30, 20))
) -> dict[str, Any]:
    """Images number 1, 2, ... of these (width, height); categories 5 ("cat") and 9 ("dog")."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": width, "height": height}
        for i, (width, height) in enumerate(sizes, start=1)
    ]
    categories = [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(folder: Path, content: dict[str, Any], name: str = "truth.json") -> Path:
    """Write the JSON and its images; returns the path of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        pixels = np.full((image["height"], image["width"], 3), 10 * image["id"], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])
    path = folder / name
    path.write_text(json.dumps(content))
    return path
