"""Speed of what surrounds the network: the training loader, and COCO metrics."""

import io
import json
import os
import tempfile
import time
from collections import deque
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, BoxMode, Instances

import miti_detr.evaluation.coco
from miti_detr.data import build_train_loader
from miti_detr.evaluation import BoxEvaluator
from miti_detr.files import write_text

from .meters import Clock
from .sides import Side
from .spec import BenchSpec

LOADER_IMAGES = 640
STEPS = 10  # of training
DETECTIONS = 100  # per image
CLASSES = 80
OBJECTS = 7  # per image, as in COCO
IMAGE_SIDE = 640  # pixels


def bench_loader(spec: BenchSpec, weights: str, images: int = LOADER_IMAGES) -> dict[str, Any]:
    """Time the config's own training loader, then training steps on its last batches.

    One after the other: beside a step, workers would seem to take no time.

    Args:
        spec: of the benchmark; batch and sizes are the config's, not the benchmark's.
        weights: checkpoint to begin with.
        images: at least so many are loaded.

    Returns:
        ``loader_seconds`` and ``step_seconds`` of each batch, ``batch`` and ``workers``; or
        ``missing``, why the data cannot be read.
    """
    side = Side(spec, "ours", weights)
    side.model.train()
    batch = side.cfg.SOLVER.IMS_PER_BATCH
    kept: deque[list[dict[str, Any]]] = deque(maxlen=STEPS)
    loader_seconds, step_seconds = [], []
    try:
        batches = iter(build_train_loader(side.cfg))
        next(batches)  # starts the workers
        for _ in range(max(STEPS, -(-images // batch))):
            start = time.perf_counter()
            kept.append(next(batches))
            loader_seconds.append(time.perf_counter() - start)
    except (OSError, KeyError) as error:  # not registered, or its files are not here
        return {"missing": f"{', '.join(side.cfg.DATASETS.TRAIN)}: {error}"}
    for number, side.inputs in enumerate([kept[0], *kept]):
        start = time.perf_counter()
        side.train_step(Clock(side.device))
        if number > 0:  # the first warms up
            step_seconds.append(time.perf_counter() - start)
    return {
        "batch": batch,
        "workers": side.cfg.DATALOADER.NUM_WORKERS,
        "loader_seconds": loader_seconds,
        "step_seconds": step_seconds,
    }


def bench_evaluation(images: int, seed: int = 0) -> dict[str, Any]:
    """Evaluate made-up detections as this package and as Detectron2 with pycocotools do.

    Args:
        images: of the made-up data set, with 100 detections each, of 80 classes.
        seed: of boxes, classes and scores.

    Returns:
        For ``ours`` and ``detectron2``: ``seconds`` from detections to results, and ``metrics``,
        the part of it from COCO's result format to the statistics; ``max_difference`` of
        statistics and precisions; the ``AP``.

    Raises:
        ImportError: if faster-coco-eval is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = f"benchmark_{images}"
        outputs = _make_data_set(name, folder, images, np.random.default_rng(seed))
        try:
            ours = BoxEvaluator(name, folder, fast=True)
            if not ours.is_fast:
                raise ImportError("the comparison needs `pip install miti_detr[fast-eval]`")
            stock = COCOEvaluator(name, ("bbox",), True, folder, use_fast_impl=False)
            results = {
                "ours": _time_evaluation(ours, miti_detr.evaluation.coco, outputs),
                "detectron2": _time_evaluation(stock, coco_evaluation, outputs),
            }
        finally:
            MetadataCatalog.remove(name)
    found = [results[label].pop("values") for label in ("ours", "detectron2")]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(*found, strict=True))
    return {"images": images, **results, "max_difference": difference, "AP": float(found[0][0][0])}


def _time_evaluation(
    evaluator: COCOEvaluator, module: ModuleType, outputs: list[dict[str, Any]]
) -> dict[str, Any]:
    """Time an evaluator; ``module`` is where it looks up the function that runs COCO's tools."""
    metrics: dict[str, Any] = {}
    run = coco_evaluation._evaluate_predictions_on_coco

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = run(*args, **kwargs)
        metrics["metrics"] = time.perf_counter() - start
        metrics["values"] = (np.asarray(result.stats[:12]), np.asarray(result.eval["precision"]))
        return result

    evaluator.reset()
    with mock.patch.object(module, run.__name__, timed), redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        for index, output in enumerate(outputs):
            evaluator.process([{"image_id": index}], [output])
        evaluator.evaluate()
        return {"seconds": time.perf_counter() - start, **metrics}


def _make_data_set(
    name: str, folder: str, images: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Register made-up truth in COCO format; returns the output of a model for each image.

    A detection lies near each object, the others anywhere.
    """
    truth = _random_boxes(images * OBJECTS, rng)
    labels = rng.integers(0, CLASSES, images * OBJECTS)
    annotations = [
        {"id": i + 1, "image_id": i // OBJECTS, "category_id": label + 1, "bbox": box}
        | {"area": box[2] * box[3], "iscrowd": 0}
        for i, (box, label) in enumerate(zip(truth.tolist(), labels.tolist(), strict=True))
    ]
    size = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    content = {
        "images": [{"id": i, "file_name": "", **size} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": str(i)} for i in range(CLASSES)],
    }
    path = os.path.join(folder, "truth.json")
    write_text(path, json.dumps(content))
    MetadataCatalog.get(name).set(
        json_file=path,
        thing_classes=[str(i) for i in range(CLASSES)],
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(CLASSES)},
    )
    outputs = []
    for image in range(images):
        mine = slice(image * OBJECTS, (image + 1) * OBJECTS)
        boxes = _random_boxes(DETECTIONS, rng)
        boxes[:OBJECTS] = truth[mine] * rng.uniform(0.9, 1.1, (OBJECTS, 4))
        classes = rng.integers(0, CLASSES, DETECTIONS)
        classes[:OBJECTS] = labels[mine]
        instances = Instances((IMAGE_SIDE, IMAGE_SIDE))
        corners = BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        instances.pred_boxes = Boxes(torch.from_numpy(corners).float())
        instances.scores = torch.from_numpy(rng.random(DETECTIONS)).float()
        instances.pred_classes = torch.from_numpy(classes)
        outputs.append({"instances": instances})
    return outputs


def _random_boxes(count: int, rng: np.random.Generator) -> np.ndarray:
    """Boxes (count, 4), xywh in pixels, from small to large by COCO's areas."""
    corner = rng.uniform(0, 0.7 * IMAGE_SIDE, (count, 2))
    return np.concatenate([corner, np.exp(rng.uniform(2, 5.3, (count, 2)))], axis=1)
