"""Training images as the model sees them, with their boxes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode

from miti_detr.data.loader import seeded, training_records
from miti_detr.data.patches import build_mapper
from miti_detr.files import replacing

from .classes import ClassTable, class_table
from .detections import CELL, choose_images, compose_pairs
from .drawing import draw_boxes, resize_for_reading, to_picture


def draw_contact_sheet(cfg: CfgNode, path: Path, *, images: int = 12) -> None:
    """Write a PNG with training images, each augmented twice.

    Args:
        cfg: of a run whose data sets are registered.
        path: PNG file.
        images: number of images, spread evenly over the training data.

    Raises:
        OSError: an image cannot be read.
    """
    records = training_records(cfg)
    mapper = build_mapper(cfg, is_train=True)
    classes = class_table(cfg.DATASETS.TRAIN[0], cfg.MODEL.DETR.NUM_CLASSES)
    pairs = []
    for index in choose_images(images, len(records)):
        pictures = []
        for seed in (2 * index, 2 * index + 1):
            with seeded(seed, seed, seed):
                mapped = mapper(records[index])
            assert mapped is not None
            image = to_picture(mapped["image"].permute(1, 2, 0).numpy(), cfg.INPUT.FORMAT)
            picture, scale = resize_for_reading(image, CELL, shrink=True)
            objects = mapped["instances"]
            labels = objects.gt_classes.tolist()
            boxes = objects.gt_boxes.tensor.numpy() * np.float32(scale)
            pictures.append(draw_boxes(picture, boxes, labels, _names(labels, classes)))
        pairs.append((pictures[0], pictures[1], Path(records[index]["file_name"]).name))
    with replacing(path) as temporary:
        sheet = compose_pairs(pairs, "training images, each augmented twice, with their objects")
        sheet.save(temporary, format="PNG")


def _names(labels: Sequence[int], classes: ClassTable) -> list[str]:
    return [classes.names[label] for label in labels]
