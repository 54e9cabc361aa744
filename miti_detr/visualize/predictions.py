"""Predictions on image files: pictures with boxes, and one file of COCO results."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode, Instances

from miti_detr.data.images import IMAGE_SUFFIXES, ImageError, image_size
from miti_detr.engine.predictor import Predictor
from miti_detr.files import replacing, write_text

from .classes import ClassTable
from .drawing import draw_instances, resize_for_reading, to_picture

logger = logging.getLogger(__name__)

# Smaller pictures are enlarged to this longest side (pixels), because labels need room.
READABLE_SIZE = 320


@dataclass
class PredictionSummary:
    """Results for a list of images.

    Attributes:
        pictures: pictures written, in the order of the images that could be read.
        skipped: (image, reason) for each image that could not be read.
        results: COCO results, in the order of the images.
    """

    pictures: list[Path] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """List image files, each once, in the given order.

    A folder contributes the images directly in it, sorted by name. A file is listed whatever its
    name, even if it is missing; the error then comes when it is read.

    Raises:
        ValueError: there are no images.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = (f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
            found.update(dict.fromkeys(sorted(inside)))
        else:
            found[path] = None
    if not found:
        raise ValueError(f"no images in {', '.join(map(str, paths))}. Sub-folders are not searched")
    return list(found)


def picture_paths(images: Sequence[Path], output_dir: Path) -> list[Path]:
    """Choose the file of each picture: the name of its image, numbered if names are repeated.

    JPEG images give JPEG pictures; all others give PNG.

    Raises:
        ValueError: a picture would replace one of the images.
    """
    taken: set[str] = set()
    chosen = []
    for image in images:
        suffix = image.suffix if image.suffix.lower() in {".jpg", ".jpeg", ".png"} else ".png"
        name, number = f"{image.stem}{suffix}", 1
        while name.lower() in taken:
            number += 1
            name = f"{image.stem}_{number}{suffix}"
        taken.add(name.lower())
        chosen.append(output_dir / name)
    sources = {image.resolve() for image in images}
    for path in chosen:
        if path.resolve() in sources:
            raise ValueError(f"{path} is one of the images. Choose another output folder")
    return chosen


def predict_images(
    predictor: Predictor,
    images: Sequence[Path],
    output_dir: Path,
    *,
    classes: ClassTable,
    threshold: float = 0.5,
    batch_size: int = 1,
    advance: Callable[[int], object] = lambda count: None,
) -> PredictionSummary:
    """Predict image files in batches, and write pictures and ``predictions.json``.

    The JSON file is a list in COCO's result format with ``file_name`` added. ``image_id`` counts
    the given images from 1, ``category_id`` is the id used by the data set, and ``bbox`` is x, y,
    width, height in pixels of the upright image.

    Args:
        predictor: the model.
        images: files; unreadable ones are skipped and reported.
        output_dir: folder for pictures and JSON, created if missing.
        classes: names and ids for labels and JSON.
        threshold: lowest score of a detection that is drawn and written.
        batch_size: number of images per forward pass; images of similar shape share a batch.
        advance: called with the number of images processed since the last call.

    Returns:
        Written and skipped files, and the results.

    Raises:
        ValueError: a picture would replace one of the images.
    """
    pictures = picture_paths(images, output_dir)
    results: dict[int, list[dict[str, Any]]] = {}
    skipped: dict[int, str] = {}
    order = sorted(range(len(images)), key=lambda index: _aspect_ratio(images[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        arrays = _read_batch(batch, images, predictor, skipped)
        detections = predictor(list(arrays.values()))
        for (index, array), instances in zip(arrays.items(), detections, strict=True):
            kept = instances[instances.scores >= threshold]
            _save_picture(pictures[index], array, kept, classes, predictor.input_format)
            results[index] = _coco_results(index + 1, images[index], kept, classes)
        advance(len(batch))
    summary = PredictionSummary(
        pictures=[pictures[index] for index in sorted(results)],
        skipped=[(images[index], skipped[index]) for index in sorted(skipped)],
        results=[result for index in sorted(results) for result in results[index]],
    )
    write_text(output_dir / "predictions.json", json.dumps(summary.results))
    return summary


def _aspect_ratio(path: Path) -> float:
    """Return width over height from the header of a file, or 0 if it cannot be read."""
    try:
        width, height = image_size(path)
        return width / height
    except ImageError:
        return 0.0


def _read_batch(
    batch: Sequence[int], images: Sequence[Path], predictor: Predictor, skipped: dict[int, str]
) -> dict[int, np.ndarray]:
    arrays = {}
    for index in batch:
        try:
            arrays[index] = predictor.read(images[index])
        except ImageError as error:
            skipped[index] = str(error)
            logger.warning("skipped: %s", error)
    return arrays


def _save_picture(
    path: Path, array: np.ndarray, instances: Instances, classes: ClassTable, input_format: str
) -> None:
    image, _ = resize_for_reading(to_picture(array, input_format), READABLE_SIZE, shrink=False)
    with replacing(path) as temporary:
        draw_instances(image, instances, classes).save(temporary, quality=92)


def _coco_results(
    image_id: int, path: Path, instances: Instances, classes: ClassTable
) -> list[dict[str, Any]]:
    corners = instances.pred_boxes.tensor
    boxes = BoxMode.convert(corners, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    scores, indices = instances.scores.tolist(), instances.pred_classes.tolist()
    return [
        {
            "image_id": image_id,
            "file_name": str(path),
            "category_id": classes.dataset_ids[class_index],
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 5),
        }
        for box, score, class_index in zip(boxes, scores, indices, strict=True)
    ]
