"""What computes the detections: an exported model; :mod:`.torch_backend` has checkpoints.

Items are Detectron2's dataset dicts: ``image`` (3, h, w) uint8 as the network takes it, ``height``
and ``width`` of the image as it was given.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from miti_detr.visualize.classes import ClassTable

from .detections import Detections, Found, Result
from .inputs import Source
from .masks import GridMasks
from .record import MASKS
from .sessions import Session

Item = dict[str, Any]


class Backend(Protocol):
    """A model, however it is computed. It is used by several threads at once.

    Attributes:
        input_format: channel order that it takes.
        orientation: ``apply`` or ``ignore`` the EXIF orientation of files.
        precision: in which it computes.
        provider: what computes, in words.
        classes: names and ids of its classes.
        with_masks: whether its detections have masks.
        threshold: recommended for it; None if nothing is recorded.
    """

    input_format: str
    orientation: str
    precision: str
    provider: str
    classes: ClassTable
    threshold: float | None
    with_masks: bool

    def prepare(self, image: np.ndarray) -> Item:
        """Resize an image (H, W, 3) uint8."""

    def detect(self, items: Sequence[Item]) -> list[Found]:
        """Detect in a batch; all detections, boxes in pixels of the images as given."""

    def result(self, found: Found, size: tuple[int, int], source: Source | None) -> Result:
        """Make what the user gets."""


class SessionBackend:
    """An exported model, by NumPy and Pillow only."""

    def __init__(self, session: Session) -> None:
        """Take an open session."""
        record = session.record
        self.record = record
        self.input_format, self.orientation = record.input_format, record.orientation
        self.precision = record.precision
        self.provider = session.provider
        self.classes = ClassTable(record.class_names, record.category_ids)
        self.threshold: float | None = record.threshold
        self.with_masks = MASKS in record.outputs
        self._run = session.run

    def prepare(self, image: np.ndarray) -> Item:
        """Resize an image (H, W, 3) uint8 as Detectron2's ``ResizeShortestEdge`` does."""
        height, width = image.shape[:2]
        size = self._network_size(height, width)
        if size != (height, width):
            picture = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
            image = np.asarray(picture)
        return {"image": image.transpose(2, 0, 1), "height": height, "width": width}

    def _network_size(self, height: int, width: int) -> tuple[int, int]:
        record = self.record
        size = resized(height, width, record.min_size, record.max_size)
        if record.static_shape is None:
            return size
        shrink = min(1.0, record.static_shape[1] / size[0], record.static_shape[2] / size[1])
        return max(1, int(shrink * size[0])), max(1, int(shrink * size[1]))

    def detect(self, items: Sequence[Item]) -> list[Found]:
        """Detect in a batch; a model of one shape takes it in parts of that shape."""
        if self.record.static_shape is None:
            return self._detect(items, None)
        count = self.record.static_shape[0]
        parts = (items[start : start + count] for start in range(0, len(items), count))
        return [one for part in parts for one in self._detect(part, self.record.static_shape)]

    def _detect(self, items: Sequence[Item], shape: tuple[int, int, int] | None) -> list[Found]:
        images, sizes = pack(items, shape, self.record.image_type)
        boxes, scores, labels, *masks = self._run(images, sizes)
        padded = self.record.padded(*images.shape[-2:])
        detections = []
        for index, item in enumerate(items):
            height, width = sizes[index].tolist()
            found = Found(boxes[index], scores[index], labels[index])
            if masks:
                output = item["height"], item["width"]
                grid = GridMasks(masks[0][index], padded, (height, width), output)
                found = found._replace(more=grid)
            things = ~np.isin(found.classes, self.record.stuff_classes)
            detections.append(to_image(found.take(things), (height, width), item))
        return detections

    def result(self, found: Found, size: tuple[int, int], source: Source | None) -> Result:
        """Make what the user gets."""
        return Detections(with_pixels(found), image_size=size, classes=self.classes, source=source)


def with_pixels(found: Found) -> Found:
    """Detections of a :class:`SessionBackend` with masks in pixels of the image, if it has any."""
    masks = None if found.more is None else found.more.pixels()
    return found._replace(masks=masks, more=None)


def pack(
    items: Sequence[Item], shape: tuple[int, int, int] | None = None, dtype: str = "uint8"
) -> tuple[np.ndarray, np.ndarray]:
    """Put images into a batch as an exported model takes it.

    Args:
        items: with ``image`` (3, h, w).
        shape: N, H and W of the batch; None: as small as possible.
        dtype: of the images.

    Returns:
        Images (N, 3, H, W), padded by zeros, and sizes (N, 2) int64.
    """
    sizes = [tuple(item["image"].shape[-2:]) for item in items]
    if shape is None:
        shape = (len(items), max(h for h, _ in sizes), max(w for _, w in sizes))
    images = np.zeros((shape[0], 3, *shape[1:]), dtype=dtype)
    for image, item, (height, width) in zip(images, items, sizes, strict=False):
        image[:, :height, :width] = item["image"]
    blank = [(1, 1)] * (shape[0] - len(items))  # fills a batch of a fixed size
    return images, np.array(sizes + blank, dtype=np.int64)


def resized(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Size to which Detectron2's ``ResizeShortestEdge`` resizes, with its rounding.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        min_size: shorter side of the result; 0: the image keeps its size.
        max_size: longest side of the result.

    Returns:
        Height and width, at least a pixel.
    """
    if min_size == 0:
        return height, width
    scale = min_size * 1.0 / min(height, width)
    new = (min_size * 1.0, scale * width) if height < width else (scale * height, min_size * 1.0)
    if max(new) > max_size:
        scale = max_size * 1.0 / max(new)
        new = new[0] * scale, new[1] * scale
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


def to_image(found: Found, size: tuple[int, int], item: Item) -> Found:
    """Scale boxes to the image as given, clip them, and drop empty ones.

    Args:
        found: with boxes in pixels of the network's input.
        size: height and width of that input without padding.
        item: with ``height`` and ``width``.

    Raises:
        ValueError: the detections are not finite.
    """
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise ValueError(
            "the prediction is NaN or infinite. Check the image, and the precision of the model."
        )
    limit = np.array([item["width"], item["height"]] * 2, dtype=np.float32)
    scale = limit / np.array([size[1], size[0]] * 2, dtype=np.float32)
    boxes = np.clip(found.boxes * scale, 0, limit)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return found._replace(boxes=boxes).take(kept)
