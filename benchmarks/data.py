"""Speed of the training loader and of the COCO metrics."""

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
from miti_detr.bench.meters import Clock
from miti_detr.data import build_train_loader
from miti_detr.evaluation import InstanceEvaluator
from miti_detr.files import write_text

from .peers import Peer
from .spec import BenchSpec

LOADER_IMAGES = 640
STEPS = 10  # training steps
DETECTIONS = 100  # detections per image
CLASSES = 80
OBJECTS = 7  # objects per image, as in COCO
IMAGE_SIDE = 640  # pixels


def bench_loader(spec: BenchSpec, weights: str, images: int = LOADER_IMAGES) -> dict[str, Any]:
    """Time the training loader of a config, then training steps on its last batches.

    They run one after the other, because loader workers that run during a step seem to take no
    time.

    Args:
        spec: what to measure. Batch and image sizes are those of the config.
        weights: checkpoint to start from.
        images: minimum number of images to load.

    Returns:
        ``loader_seconds`` and ``step_seconds`` of each batch, ``batch`` and ``workers``; or
        ``missing``, the reason why the data cannot be read.
    """
    peer = Peer(spec, "ours", weights)
    peer.model.train()
    batch = peer.cfg.SOLVER.IMS_PER_BATCH
    kept: deque[list[dict[str, Any]]] = deque(maxlen=STEPS)
    loader_seconds, step_seconds = [], []
    try:
        batches = iter(build_train_loader(peer.cfg))
        next(batches)  # starts the workers
        for _ in range(max(STEPS, -(-images // batch))):
            start = time.perf_counter()
            kept.append(next(batches))
            loader_seconds.append(time.perf_counter() - start)
    except (OSError, KeyError) as error:  # not registered, or its files are missing
        return {"missing": f"{', '.join(peer.cfg.DATASETS.TRAIN)}: {error}"}
    for number, peer.inputs in enumerate([kept[0], *kept]):
        start = time.perf_counter()
        peer.train_step(Clock(peer.device))
        if number > 0:  # the first one is the warm-up
            step_seconds.append(time.perf_counter() - start)
    return {
        "batch": batch,
        "workers": peer.cfg.DATALOADER.NUM_WORKERS,
        "loader_seconds": loader_seconds,
        "step_seconds": step_seconds,
    }


def bench_evaluation(images: int, seed: int = 0) -> dict[str, Any]:
    """Evaluate synthetic detections with this package and with Detectron2 and pycocotools.

    Args:
        images: number of images of the synthetic data set, with 100 detections each of 80 classes.
        seed: seed of boxes, classes and scores.

    Returns:
        For ``ours`` and ``detectron2`` the ``seconds`` from detections to results, and
        ``metrics``, the part of them from COCO's result format to the statistics; also the
        ``max_difference`` of statistics and precisions, and the ``AP``.

    Raises:
        ImportError: faster-coco-eval is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        name = f"benchmark_{images}"
        outputs = _make_data_set(name, folder, images, np.random.default_rng(seed))
        try:
            ours = InstanceEvaluator(name, folder, fast=True)
            if not ours.is_fast:
                raise ImportError(
                    "faster-coco-eval is missing. Run `pip install miti_detr[fast-eval]`"
                )
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
    """Time an evaluator. ``module`` is where it looks up the function that runs COCO's tools."""
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
    """Register synthetic ground truth in COCO format.

    Returns:
        The output of a model for each image. One detection lies near each object, the others
        anywhere.
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
    """Make boxes (count, 4), xywh in pixels, of all sizes that COCO distinguishes."""
    corner = rng.uniform(0, 0.7 * IMAGE_SIDE, (count, 2))
    return np.concatenate([corner, np.exp(rng.uniform(2, 5.3, (count, 2)))], axis=1)
