"""The paper's Figure 4: ground truth and all models on the images where these differ most."""

import contextlib
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from PIL import Image

from miti_detr.data import read_image
from miti_detr.engine import setup_config
from miti_detr.files import replacing
from miti_detr.study.comparison import ArmResult
from miti_detr.study.results import RunResult
from miti_detr.visualize.classes import ClassTable, class_table
from miti_detr.visualize.detections import CELL, draw_truth
from miti_detr.visualize.drawing import draw_boxes, resize_for_reading, to_picture

IOU = 0.5  # lowest IoU of a detection with the object it finds
TRUTH = "truth"
DETECTIONS_FILE = "coco_instances_results.json"


@dataclasses.dataclass(frozen=True)
class ComparedImage:
    """One image of the figure.

    Attributes:
        file_name: name of the image file.
        pictures: name of an arm, or :data:`TRUTH` -> JPEG file.
        errors: name of an arm -> (missed objects, false detections).
    """

    file_name: str
    pictures: dict[str, Path]
    errors: dict[str, tuple[int, int]]


def draw_most_different(
    arms: Sequence[ArmResult], folder: Path, *, images: int = 8, threshold: float = 0.5
) -> tuple[list[ComparedImage], str]:
    """Draw the images of the test set on which the number of errors differs most between arms.

    One run of each arm is shown: the one with the lowest seed that all arms have. An error is an
    object that no detection finds, or a detection that finds no object. A detection finds an object
    of its class with an IoU of 0.5 or more; detections are assigned in the order of their scores,
    and each object is found once.

    Args:
        arms: arms to compare.
        folder: folder for the pictures.
        images: maximum number of images.
        threshold: lowest score of a detection that is counted and drawn.

    Returns:
        The images, sorted by the range of their errors, and a note about the runs they are from.
        Without detections or data, no images and a note about what is missing.

    Raises:
        ValueError: a file of detections is damaged.
    """
    chosen = _choose_runs(arms)
    try:
        dataset, records, files = _find_data(chosen)
    except (OSError, ValueError) as error:
        return [], f"Figure 4 is left out: {error}"
    classes = class_table(dataset, len(MetadataCatalog.get(dataset).thing_classes))
    results = [_read_detections(file, threshold, classes) for file in files]
    errors = {
        key: [count_errors(record, found[key], classes) for found in results]
        for key, record in records.items()
    }
    totals = {key: [sum(pair) for pair in pairs] for key, pairs in errors.items()}
    # The sort is stable: images with equal ranges keep the order of the data set.
    order = sorted(totals, key=lambda key: min(totals[key]) - max(totals[key]))
    names = [arm.name for arm in arms]
    orientation = str(chosen[0].config.get("DATASETS.EXIF_ORIENTATION", "apply"))
    picked = []
    for place, key in enumerate(order[:images], start=1):
        found = [result[key] for result in results]
        array = read_image(records[key]["file_name"], "RGB", orientation)
        drawn = _draw(array, records[key], dict(zip(names, found, strict=True)), classes)
        pictures = {name: folder / f"{place:02d}_{name.replace('/', '_')}.jpg" for name in drawn}
        for name, picture in drawn.items():
            with replacing(pictures[name]) as temporary:
                picture.save(temporary, format="JPEG", quality=90)
        file_name = Path(records[key]["file_name"]).name
        counts = dict(zip(names, errors[key], strict=True))
        picked.append(ComparedImage(file_name, pictures, counts))
    return picked, f"Runs: {', '.join(run.metrics.name for run in chosen)}. Data: {dataset}."


def _find_data(runs: Sequence[RunResult]) -> tuple[str, dict[Any, dict[str, Any]], list[Path]]:
    """Find the test set of some runs: its name, its images by id, and the detections of each run.

    Raises:
        OSError: the data set or the detections are missing.
        ValueError: the annotation file of the data set is damaged.
    """
    names = runs[0].config.get("DATASETS.TEST")
    dataset = str(names[0]) if isinstance(names, (list, tuple)) and names else ""
    # Register the data sets of the config. The config of another project may not be valid here.
    with contextlib.suppress(ValueError, KeyError, OSError):
        setup_config(str(runs[0].path / "config.yaml"), ["OUTPUT_DIR", str(runs[0].path)])
    if dataset not in DatasetCatalog:
        raise FileNotFoundError(f"the test set {dataset or '(unknown)'} is not registered.")
    files = []
    for run in runs:
        places = [run.path / "inference" / folder / DETECTIONS_FILE for folder in (dataset, ".")]
        file = next((file for file in places if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{run.metrics.name} has no {DETECTIONS_FILE}.")
        files.append(file)
    records = {record["image_id"]: record for record in DatasetCatalog.get(dataset)}
    return dataset, records, files


def count_errors(
    record: dict[str, Any], detections: Sequence[dict[str, Any]], classes: ClassTable
) -> tuple[int, int]:
    """Count missed objects and false detections of an image.

    Args:
        record: Detectron2's dataset dict; crowds are ignored.
        detections: COCO results, sorted by decreasing score.
        classes: classes of the data set.

    Returns:
        (missed objects, false detections).
    """
    objects = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    truth = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in objects]
    overlap = pairwise_iou(_boxes([_corners(d) for d in detections]), _boxes(truth)).numpy()
    labels = np.array([a["category_id"] for a in objects], dtype=int)
    free = np.ones(len(objects), dtype=bool)
    found = 0
    for row, detection in zip(overlap, detections, strict=True):
        row = np.where(
            free & (labels == classes.dataset_ids.index(detection["category_id"])), row, 0
        )
        if len(row) and row.max() >= IOU:
            free[row.argmax()] = False
            found += 1
    return int(free.sum()), len(detections) - found


def _choose_runs(arms: Sequence[ArmResult]) -> list[RunResult]:
    common = set.intersection(*({run.seed for run in arm.runs} for arm in arms))
    seeds = sorted(seed for seed in common if seed is not None)
    if not seeds:
        return [arm.runs[0] for arm in arms]
    return [next(run for run in arm.runs if run.seed == seeds[0]) for arm in arms]


def _read_detections(
    path: Path, threshold: float, classes: ClassTable
) -> dict[Any, list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    try:
        for result in json.loads(path.read_text(encoding="utf-8")):
            x, y, width, height = map(float, result["bbox"])
            if not math.isfinite(x + y + width + height):
                raise ValueError(f"bbox is {result['bbox']}")
            if result["category_id"] not in classes.dataset_ids:
                raise ValueError(f"category_id is {result['category_id']}")
            if float(result["score"]) >= threshold:
                found[result["image_id"]].append(result)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged: {' '.join(str(error).split())}. Evaluate the run again, or remove "
            "the file to leave Figure 4 out"
        ) from error
    for results in found.values():
        results.sort(key=lambda result: -result["score"])
    return found


def _draw(
    array: np.ndarray,
    record: dict[str, Any],
    detections: dict[str, list[dict[str, Any]]],
    classes: ClassTable,
) -> dict[str, Image.Image]:
    """Return the pictures of the ground truth and of each arm, by name."""
    image, scale = resize_for_reading(to_picture(array, "RGB"), CELL, shrink=True)
    pictures = {TRUTH: draw_truth(image, scale, record, classes)}
    for name, found in detections.items():
        surest_last = found[::-1]
        indices = [classes.dataset_ids.index(d["category_id"]) for d in surest_last]
        labels = [
            f"{classes.names[index]} {detection['score']:.2f}"
            for index, detection in zip(indices, surest_last, strict=True)
        ]
        corners = np.array([_corners(d) for d in surest_last], dtype=float).reshape(-1, 4) * scale
        pictures[name] = draw_boxes(image, corners, indices, labels)
    return pictures


def _corners(detection: dict[str, Any]) -> list[float]:
    x, y, width, height = detection["bbox"]
    return [x, y, x + width, y + height]


def _boxes(corners: Sequence[Any]) -> Boxes:
    return Boxes(torch.as_tensor(np.array(corners, dtype=np.float32).reshape(-1, 4)))
