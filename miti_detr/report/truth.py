"""The objects of a data set, from its annotation file."""

import os
import tempfile
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json

from miti_detr.data.coco.coco_file import CocoFile
from miti_detr.data.coco_format import CocoSource, coco_source

from .arrays import Truth


def read_truth(dataset: str, images: str | None = None) -> Truth:
    """Read the objects of a data set.

    Args:
        dataset: a registered name, or an annotation file in COCO format.
        images: folder of the images of an annotation file; None: the folder of the file.

    Raises:
        OSError: a file does not exist.
        ValueError: the data set is unknown, cannot be read, or has neither images nor objects.
    """
    if dataset in DatasetCatalog:
        if images is not None:
            raise ValueError(f"{dataset} is registered with its images: leave out --images.")
        file, root = _read_registered(dataset)
    elif dataset.lower().endswith(".json"):
        root = images if images is not None else os.path.dirname(dataset)
        file = CocoSource(dataset, dataset, root, copy="").read()
    else:
        raise ValueError(
            f"the data set {dataset!r} is not registered. Give a registered name, such as "
            "shapes_val, or an annotation file that ends in .json, with its folder in --images."
        )
    truth = _to_arrays(file, root)
    if not len(truth.files) or truth.crowd.all():
        raise ValueError(f"{dataset} has {len(truth.files)} images and no objects to evaluate.")
    return truth


def _read_registered(name: str) -> tuple[CocoFile, str]:
    """Read the annotation file of a registered data set; without one, write its records first."""
    metadata = MetadataCatalog.get(name)
    source = coco_source(name)
    if source is not None:
        return source.read(), source.image_root
    if metadata.get("json_file") is not None:
        root = str(metadata.get("image_root", ""))
        return CocoSource(name, str(metadata.json_file), root, copy="").read(), root
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        convert_to_coco_json(name, str(path))
        return CocoSource(name, str(path), "", copy="").read(), ""


def _to_arrays(file: CocoFile, root: str) -> Truth:
    content = file.to_json()
    images = sorted(content["images"], key=lambda image: image["id"])
    index = {image["id"]: place for place, image in enumerate(images)}
    labels = {category["id"]: place for place, category in enumerate(content["categories"])}
    objects = content.get("annotations", [])
    # Stable: the objects of an image keep their order, as in pycocotools.
    objects = sorted(objects, key=lambda annotation: index[annotation["image_id"]])
    sizes = [(image["height"], image["width"]) for image in images]
    return Truth(
        class_names=[category["name"] for category in content["categories"]],
        files=[os.path.join(root, image["file_name"]) for image in images],
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        image=np.array([index[a["image_id"]] for a in objects], dtype=np.int64),
        label=np.array([labels[a["category_id"]] for a in objects], dtype=np.int64),
        boxes=np.array([a["bbox"] for a in objects], dtype=float).reshape(-1, 4),
        area=np.array([a["area"] for a in objects], dtype=float),
        crowd=np.array([bool(a["iscrowd"]) for a in objects], dtype=bool),
    )
