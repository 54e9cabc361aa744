"""The images with the most errors, drawn."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from miti_detr.files import replacing
from miti_detr.visualize.drawing import draw_boxes, resize_for_reading

from .errors import FALSE_KINDS, NO_ERROR
from .evaluation import Evaluation

LONGEST = 640  # longer side of a picture, pixels


@dataclasses.dataclass(frozen=True)
class WorstImage:
    """An image with many errors.

    Attributes:
        file_name: name of the image file.
        missed: number of missed objects.
        false: number of false detections.
        truth: JPEG with the objects.
        found: JPEG with the detections.
    """

    file_name: str
    missed: int
    false: int
    truth: Path
    found: Path


def draw_worst(
    evaluation: Evaluation, read: Callable[[str], Image.Image], folder: Path, images: int
) -> list[WorstImage]:
    """Draw the images with the most missed objects and false detections at the threshold.

    Args:
        evaluation: the numbers.
        read: reads an image file as the model sees it.
        folder: folder for the pictures.
        images: largest number of images; images without errors are left out.
    """
    false, missed = evaluation.false_and_missed()
    order = np.argsort(-(false + missed), kind="stable")[:images]
    drawn = []
    for place, index in enumerate(order.tolist(), start=1):
        if not false[index] + missed[index]:
            break
        file = Path(evaluation.truth.files[index])
        picture, scale = resize_for_reading(read(str(file)), LONGEST, shrink=True)
        pictures = (
            _draw_truth(evaluation, index, picture, scale),
            _draw_found(evaluation, index, picture, scale),
        )
        paths = [folder / f"{place:02d}_{name}.jpg" for name in ("truth", "found")]
        for path, drawing in zip(paths, pictures, strict=True):
            with replacing(path) as temporary:
                drawing.save(temporary, format="JPEG", quality=85)
        drawn.append(WorstImage(file.name, int(missed[index]), int(false[index]), *paths))
    return drawn


def _draw_truth(
    evaluation: Evaluation, index: int, picture: Image.Image, scale: float
) -> Image.Image:
    truth, found = evaluation.truth, evaluation.errors[1].found
    chosen = np.flatnonzero((truth.image == index) & ~truth.crowd)
    labels = [truth.class_names[truth.label[i]] + ("" if found[i] else ": missed") for i in chosen]
    boxes = _corners(truth.boxes[chosen]) * scale
    return draw_boxes(picture, boxes, truth.label[chosen].tolist(), labels)


def _draw_found(
    evaluation: Evaluation, index: int, picture: Image.Image, scale: float
) -> Image.Image:
    detections, kinds = evaluation.detections, evaluation.errors[1].kind
    kept = (detections.image == index) & (detections.score >= evaluation.thresholds.chosen)
    chosen = np.flatnonzero(kept)[::-1]  # the highest score on top
    labels = [
        ""
        if kinds[i] == NO_ERROR
        else f"{evaluation.truth.class_names[detections.label[i]]} {detections.score[i]:.2f}: "
        f"{FALSE_KINDS[kinds[i]]}"
        for i in chosen
    ]
    boxes = _corners(detections.boxes[chosen]) * scale
    return draw_boxes(picture, boxes, detections.label[chosen].tolist(), labels)


def _corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
