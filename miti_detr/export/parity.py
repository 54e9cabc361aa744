"""Comparison of an exported model with the model itself, on images of the built-in data set."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList

from miti_detr.data.shapes_render import render
from miti_detr.modeling import MitiDetr
from miti_detr.predict.backends import Item, SessionBackend, pack
from miti_detr.predict.sessions import Session

_SEEDS = range(1_000_000_000, 1_000_000_004)  # of the first images of shapes_val
_SCALES = (1.0, 0.7)  # of the size of the network's input


class Parity(NamedTuple):
    """The largest differences between two models.

    Attributes:
        boxes: of a coordinate, in parts of the image's height or width.
        scores: in parts of 1.
    """

    boxes: float
    scores: float

    def __str__(self) -> str:
        """In words."""
        return f"boxes differ by {self.boxes:.1e} of the image, scores by {self.scores:.1e}"

    def exceeds(self, tolerance: float) -> bool:
        """Whether a difference is larger than the tolerance, or not a number."""
        return not (self.boxes <= tolerance and self.scores <= tolerance)


def compare(model: MitiDetr, session: Session) -> Parity:
    """Run both models on single images and on padded batches of several sizes.

    Args:
        model: in evaluation mode.
        session: the same model, exported.
    """
    worst = Parity(0.0, 0.0)
    for batch in parity_batches(session):
        images, sizes = pack(batch, session.record.static_shape, session.record.image_type)
        exported = session.run(images, sizes)
        eager = run_eager(model, batch, images.shape[-2:])
        for index, size in enumerate(sizes[: len(batch)].tolist()):
            scale = np.array([size[1], size[0]] * 2, dtype=np.float32)
            found = [output[index] for output in exported]
            one = difference([output[index] for output in eager], found, scale)
            worst = Parity(*(max(pair) for pair in zip(worst, one, strict=True)))
    return worst


def parity_batches(session: Session) -> list[list[Item]]:
    """Images as the network takes them: each one by itself, then all together, in two sizes."""
    pictures = [render(seed)[0] for seed in _SEEDS]
    if session.record.input_format == "BGR":
        pictures = [np.ascontiguousarray(picture[:, :, ::-1]) for picture in pictures]
    record, result = session.record, list[list[Item]]()
    for scale in _SCALES:
        smaller = dataclasses.replace(
            record,
            min_size=max(1, int(scale * record.min_size)) if record.min_size else 0,
            max_size=max(1, int(scale * record.max_size)),
        )
        backend = SessionBackend(session._replace(record=smaller))
        items = [backend.prepare(picture) for picture in pictures]
        count = len(items) if record.static_shape is None else record.static_shape[0]
        result += [[item] for item in items]
        result += [items[start : start + count] for start in range(0, len(items), count)]
    return result


def run_eager(
    model: MitiDetr, items: Sequence[Item], padded: tuple[int, ...] = (0, 0)
) -> list[np.ndarray]:
    """Boxes (N, D, 4), scores and labels (N, D) of a model, by its own preprocessing.

    Args:
        model: in evaluation mode.
        items: a batch.
        padded: least height and width of the batch, as the features of an image depend on the
            padding beside it.
    """
    inputs = [
        {**item, "image": torch.from_numpy(np.ascontiguousarray(item["image"]))} for item in items
    ]
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        height, width = images.tensor.shape[-2:]
        more = (0, max(0, padded[1] - width), 0, max(0, padded[0] - height))
        images = ImageList(F.pad(images.tensor, more), images.image_sizes)
        prediction = model.predict_set(images, inputs, all_layers=False)
        results = model.read_detections(prediction, images.image_sizes)
    for result in results:
        result.pred_boxes.clip(result.image_size)
    return [
        np.stack([field.cpu().numpy() for field in fields])
        for fields in zip(
            *((x.pred_boxes.tensor, x.scores, x.pred_classes) for x in results), strict=True
        )
    ]


def difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], scale: np.ndarray
) -> Parity:
    """Compare the detections of one image, in whatever order they are.

    Each detection of one side is compared with the most similar one of the same class of the other
    side.

    Args:
        first: boxes (D, 4), scores (D,) and labels (D,).
        second: likewise.
        scale: width, height, width and height of the image in pixels.
    """
    boxes = (np.abs(first[0][:, None] - second[0][None]) / scale).max(-1)
    scores = np.abs(first[1][:, None] - second[1][None])
    other = np.asarray(first[2])[:, None] != np.asarray(second[2])[None]
    total = np.where(other, 2.0, boxes + scores)
    total = np.where(np.isnan(total), np.inf, total)
    worst = Parity(0.0, 0.0)
    for axis in (0, 1):
        best = np.expand_dims(total.argmin(axis), axis)
        pairs = (np.take_along_axis(values, best, axis) for values in (boxes, scores, other))
        box, score, wrong = (float(values.max()) for values in pairs)
        box, score = (np.inf if np.isnan(value) else value for value in (box, score))
        worst = Parity(max(worst.boxes, box), max(worst.scores, score, wrong))
    return worst
