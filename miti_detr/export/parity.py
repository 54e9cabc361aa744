"""Comparison of an exported model with the model itself, on images of the built-in data set.

D detections, h' x w' grid of mask logits.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor

from miti_detr.data.shapes_render import render
from miti_detr.modeling import MitiDetr
from miti_detr.modeling.segmentation import MaskPrediction, SegmentationDetr
from miti_detr.modeling.stages import SetPrediction
from miti_detr.predict.backends import Item, SessionBackend, pack
from miti_detr.predict.record import MASKS, OUTPUTS
from miti_detr.predict.sessions import Session

from .tensor_detector import CHUNK

TOLERANCE = 1e-4  # of all differences, in float32
PIXELS = 10  # times as much is allowed of pixels

_SEEDS = range(1_000_000_000, 1_000_000_004)  # of the first images of shapes_val
_SCALES = (1.0, 0.7)  # of the size of the network's input


class Parity(NamedTuple):
    """The largest differences between two models.

    Attributes:
        boxes: of a coordinate, in parts of the image's height or width.
        scores: in parts of 1.
        masks: of a mask logit, in parts of the largest one of the image, by which float32 rounds;
            None: there are no masks.
        pixels: share of the cells of masks that are inside of the object in one model only.
    """

    boxes: float
    scores: float
    masks: float | None = None
    pixels: float | None = None

    def __str__(self) -> str:
        """In words."""
        text = f"boxes differ by {self.boxes:.1e} of the image, scores by {self.scores:.1e}"
        if self.masks is not None:
            text += f", mask logits by {self.masks:.1e} of the largest, {self.pixels:.1e} of pixels"
        return text

    def exceeds(self, tolerance: float) -> bool:
        """Whether a difference is larger than the tolerance, or not a number.

        Of pixels ten times as much is allowed: where a logit is almost 0, both sides are right.
        """
        limited = (self.boxes, self.scores, self.masks or 0.0, (self.pixels or 0.0) / PIXELS)
        return not all(value <= tolerance for value in limited)

    @classmethod
    def joined(cls, several: Sequence["Parity"]) -> "Parity":
        """The largest differences, and the mean share of pixels."""
        boxes, scores = (max(values) for values in zip(*(x[:2] for x in several), strict=True))
        masks = [x.masks for x in several if x.masks is not None]
        pixels = [x.pixels for x in several if x.pixels is not None]
        if not masks:
            return cls(boxes, scores)
        return cls(boxes, scores, max(masks), sum(pixels) / len(pixels))


def compare(model: MitiDetr, session: Session, top_k: int | None = None) -> Parity:
    """Run both models on single images and on padded batches of several sizes.

    Args:
        model: in evaluation mode.
        session: the same model, exported.
        top_k: the best detections of an image that the exported model returns; None: all.
    """
    record, found = session.record, list[Parity]()
    for batch in parity_batches(session):
        images, sizes = pack(batch, record.static_shape, record.image_type)
        outputs = session.run(images, sizes)
        eager = run_eager(model, batch, images.shape[-2:], masks=MASKS in record.outputs)
        for index, size in enumerate(sizes[: len(batch)].tolist()):
            scale = np.array([size[1], size[0]] * 2, dtype=np.float32)
            things = ~np.isin(outputs[2][index], record.stuff_classes)
            exported = [output[index][things] for output in outputs]
            wanted = eager[index]
            if top_k is not None:
                # Of detections whose scores are almost equal, either may be the last one.
                least = min(exported[1].tolist(), default=-math.inf) + TOLERANCE
                wanted = [output[wanted[1] > least] for output in wanted]
            found += [one_way(exported, eager[index], scale), one_way(wanted, exported, scale)]
    return Parity.joined(found)


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
    model: MitiDetr, items: Sequence[Item], padded: tuple[int, ...] = (0, 0), *, masks: bool = False
) -> list[list[np.ndarray]]:
    """Detections of a model, by its own preprocessing.

    Args:
        model: in evaluation mode.
        items: a batch.
        padded: least height and width of the batch, as the features of an image depend on the
            padding beside it.
        masks: with masks.

    Returns:
        For each image boxes (D, 4), scores and labels (D,) and, if asked for, mask logits
        (D, h', w').
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
        found = []
        for index, result in enumerate(results):
            result.pred_boxes.clip(result.image_size)
            fields = [result.pred_boxes.tensor, result.scores, result.pred_classes]
            if masks:
                fields.append(_mask_logits(model, prediction, index, result.pred_queries))
            found.append([field.cpu().numpy() for field in fields])
    return found


def _mask_logits(model: MitiDetr, prediction: SetPrediction, index: int, queries: Tensor) -> Tensor:
    """Of queries of one image; a few at a time, as they need much memory."""
    assert isinstance(model, SegmentationDetr)
    assert isinstance(prediction, MaskPrediction)
    image = torch.full_like(queries, index)
    parts = zip(image.split(CHUNK), queries.split(CHUNK), strict=True)
    return torch.cat([model.mask_logits(prediction, *part) for part in parts])


def one_way(these: Sequence[np.ndarray], others: Sequence[np.ndarray], scale: np.ndarray) -> Parity:
    """Compare each detection with the most similar one of its class on the other side.

    Args:
        these: boxes (D, 4), scores (D,) and labels (D,) and, if there are any, mask logits
            (D, h', w') of one image.
        others: likewise.
        scale: width, height, width and height of the image in pixels.
    """
    if not len(these[1]):
        return Parity(0.0, 0.0)
    if not len(others[1]):
        return Parity(np.inf, np.inf)
    boxes = (np.abs(these[0][:, None] - others[0][None]) / scale).max(-1)
    scores = np.abs(these[1][:, None] - others[1][None])
    other = np.asarray(these[2])[:, None] != np.asarray(others[2])[None]
    total = np.where(other, 2.0, boxes + scores)
    best = np.where(np.isnan(total), np.inf, total).argmin(1)
    rows = np.arange(len(best))
    box, score, wrong = (float(values[rows, best].max()) for values in (boxes, scores, other))
    found = [box, max(score, wrong)]
    if len(these) > len(OUTPUTS):
        mine, partner = these[3], others[3][best]
        largest = max(np.abs(others[3]).max(), np.finfo(np.float32).tiny)
        found += [np.abs(mine - partner).max() / largest, ((mine > 0) != (partner > 0)).mean()]
    return Parity(*(np.inf if np.isnan(value) else float(value) for value in found))
