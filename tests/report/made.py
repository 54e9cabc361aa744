"""Random data sets and detectors, and pycocotools' evaluation of them."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from miti_detr.report.arrays import Detections, Truth, sort_detections


def made_truth(
    seed: int, *, images: int = 12, classes: int = 3, most: int = 6, crowds: float = 0.1
) -> Truth:
    """Objects of all sizes, a few of which are crowds; some images are empty."""
    rng = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), rng.integers(0, most + 1, images))
    count = len(image)
    sides = np.exp(rng.uniform(np.log(8), np.log(200), (count, 2)))
    boxes = np.concatenate([rng.uniform(0, 200, (count, 2)), sides], axis=1)
    return Truth(
        class_names=[f"class {index}" for index in range(classes)],
        files=[f"{index}.png" for index in range(images)],
        sizes=np.full((images, 2), 400),
        image=image,
        label=rng.integers(0, classes, count),
        boxes=boxes,
        area=sides.prod(1) * rng.uniform(0.5, 1, count),
        crowd=rng.uniform(size=count) < crowds,
    )


def made_detections(truth: Truth, seed: int, *, noise: int = 8) -> Detections:
    """Objects found once or more often, moved, some of another class; and boxes of nothing."""
    rng = np.random.default_rng(seed)
    chosen = np.repeat(np.arange(len(truth.image)), rng.integers(0, 3, len(truth.image)))
    move = rng.normal(0, 0.12, (len(chosen), 4)) * truth.boxes[chosen][:, [2, 3, 2, 3]]
    boxes = truth.boxes[chosen] + move
    label = truth.label[chosen].copy()
    flipped = rng.uniform(size=len(chosen)) < 0.2
    label[flipped] = rng.integers(0, len(truth.class_names), flipped.sum())
    image = truth.image[chosen]
    count = len(truth.files) * noise
    nothing = np.concatenate(
        [rng.uniform(0, 200, (count, 2)), np.exp(rng.uniform(2, 5, (count, 2)))], axis=1
    )
    image = np.concatenate([image, rng.integers(0, len(truth.files), count)])
    label = np.concatenate([label, rng.integers(0, len(truth.class_names), count)])
    score = np.concatenate([rng.beta(4, 2, len(chosen)), rng.beta(1, 4, count)])
    return sort_detections(image, label, np.concatenate([boxes, nothing]), score)


def iou(box: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two boxes, x, y, width and height."""
    width = min(box[0] + box[2], other[0] + other[2]) - max(box[0], other[0])
    height = min(box[1] + box[3], other[1] + other[3]) - max(box[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return float(shared / (box[2] * box[3] + other[2] * other[3] - shared))


def coco_eval(
    truth: Truth, detections: Detections, images: Sequence[int] | None = None
) -> COCOeval:
    """Evaluate by pycocotools.

    Args:
        truth: the objects.
        detections: of a detector.
        images: indices of the images, which may repeat; None: all.
    """
    images = range(len(truth.files)) if images is None else images
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for new, old in enumerate(images, start=1):
        for place in np.flatnonzero(truth.image == old):
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": new,
                    "category_id": int(truth.label[place]) + 1,
                    "bbox": truth.boxes[place].tolist(),
                    "area": float(truth.area[place]),
                    "iscrowd": int(truth.crowd[place]),
                }
            )
        for place in np.flatnonzero(detections.image == old):
            results.append(
                {
                    "image_id": new,
                    "category_id": int(detections.label[place]) + 1,
                    "bbox": detections.boxes[place].tolist(),
                    "score": float(detections.score[place]),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": new} for new in range(1, len(images) + 1)],
            "categories": [{"id": k + 1, "name": n} for k, n in enumerate(truth.class_names)],
            "annotations": objects,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
