"""The detections of one image, and what they can be turned into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from miti_detr.visualize.classes import ClassTable
from miti_detr.visualize.drawing import draw_boxes, draw_masks

from .inputs import Source
from .masks import run_lengths


class Found(NamedTuple):
    """The bare detections of one image.

    Attributes:
        boxes: (n, 4) float32, xyxy in pixels of the image, inside of it.
        scores: (n,) float32 in [0, 1].
        classes: (n,) int64, contiguous.
        masks: (n, height, width) bool, or their :func:`~miti_detr.predict.masks.run_lengths`; None:
            the model has none.
        more: what the backend needs to make masks and results; indexed as the others.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None = None
    more: Any = None

    def take(self, chosen: Any) -> Found:
        """Some of the detections, by indices, a slice or a mask."""
        fields: list[Any] = [None if field is None else field[chosen] for field in self]
        return Found(*fields)


def packed(found: Found) -> Found:
    """Bare detections that take little memory: with run lengths, and without ``more``."""
    masks = None if found.masks is None else run_lengths(found.masks)
    return found._replace(masks=masks, more=None)


class Result:
    """What the results of all kinds of models share.

    Attributes:
        boxes: (n, 4) float32, xyxy in pixels of the image.
        image_size: height and width of the image in pixels.
    """

    _source: Source | None
    _classes: ClassTable
    _picture: Image.Image | None = None

    def found(self) -> Found:
        """The bare detections as arrays."""
        raise NotImplementedError

    @property
    def boxes(self) -> np.ndarray:
        """The boxes (n, 4) as an array, xyxy in pixels of the image."""
        return self.found().boxes

    @property
    def masks(self) -> np.ndarray | None:
        """The masks (n, height, width) as a bool array in the size of the image, or None."""
        return self.found().masks

    @property
    def class_names(self) -> list[str]:
        """The class of each detection."""
        return [self._classes.names[index] for index in self.found().classes.tolist()]

    def to_coco(self, image_id: int | str = 1) -> list[dict[str, Any]]:
        """Return the detections in COCO's result format.

        Args:
            image_id: of the image.

        Returns:
            For each detection ``image_id``, ``category_id`` (as in the data set of the model),
            ``bbox`` (x, y, width, height in pixels) and ``score``; with masks also
            ``segmentation`` (compressed run lengths).
        """
        return coco_results(self.found(), self._classes, image_id=image_id)

    def to_supervision(self) -> Any:
        """Return the detections as ``supervision.Detections``; needs the package supervision."""
        try:
            from supervision import Detections as Supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs `pip install supervision`") from error
        boxes, scores, classes, masks, _ = self.found()
        names = np.array(self.class_names, dtype=str)
        data = {"class_name": names}
        return Supervision(xyxy=boxes, mask=masks, confidence=scores, class_id=classes, data=data)

    def draw(self, image: Any = None) -> Image.Image:
        """Draw the detections.

        Args:
            image: picture to draw on, of any kind and size that :func:`to_array` takes in RGB; by
                default the image that the predictor was given. A file is read again; an array
                must not have been overwritten meanwhile.

        Returns:
            New RGB picture of the size of the image.
        """
        if image is None and self._picture is not None:
            return self._picture
        source = self._source if image is None else Source(image, "RGB")
        return self.draw_on(_to_picture(source))

    def picture(self) -> Image.Image:
        """The image that the predictor was given."""
        return _to_picture(self._source)

    def draw_on(self, picture: Image.Image) -> Image.Image:
        """Draw the detections on a copy of an RGB picture of any size."""
        boxes, scores, classes, masks, _ = self.found()
        height, width = self.image_size  # type: ignore[attr-defined]
        scale = np.array([picture.width / width, picture.height / height] * 2)
        order = scores.argsort()  # the best one on top
        if masks is not None:
            picture = draw_masks(picture, list(masks[order]), classes[order].tolist())
        labels = [
            f"{self._classes.names[classes[index]]} {scores[index]:.2f}" for index in order.tolist()
        ]
        return draw_boxes(picture, boxes[order] * scale, classes[order].tolist(), labels)

    def keep_picture(self) -> Result:
        """Draw now, so that :meth:`draw` returns at once."""
        self._picture = self.draw()
        return self


class Detections(Result):
    """Detections of an exported model: arrays with the fields of Detectron2's ``Instances``.

    Attributes:
        image_size: height and width of the image in pixels.
        pred_boxes: (n, 4) float32, xyxy in pixels of the image.
        scores: (n,) float32, in descending order.
        pred_classes: (n,) int64, contiguous.
        pred_masks: (n, height, width) bool in the size of the image; None: the model has none.
    """

    def __init__(
        self,
        found: Found,
        *,
        image_size: tuple[int, int],
        classes: ClassTable,
        source: Source | None = None,
    ) -> None:
        """Keep the detections, the size of the image, the table of classes, and the image."""
        self.image_size = image_size
        self.pred_boxes, self.scores, self.pred_classes, self.pred_masks, _ = found
        self._classes = classes
        self._source = source

    def found(self) -> Found:
        """The bare detections as arrays."""
        return Found(self.pred_boxes, self.scores, self.pred_classes, self.pred_masks)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, item: int | slice | Sequence[int] | np.ndarray) -> Detections:
        """Some of the detections, as with ``Instances``."""
        chosen = [range(len(self))[item]] if isinstance(item, int) else item
        return Detections(
            self.found().take(np.asarray(chosen) if isinstance(chosen, list) else chosen),
            image_size=self.image_size,
            classes=self._classes,
            source=self._source,
        )

    def __repr__(self) -> str:
        return (
            f"Detections(num_instances={len(self)}, image_size={self.image_size}, "
            f"scores={self.scores.tolist()}, class_names={self.class_names})"
        )


def _to_picture(source: Source | None) -> Image.Image:
    if source is None:
        raise ValueError("the image is not known. Give it: result.draw(image)")
    return Image.fromarray(source.read("RGB"))


def coco_results(found: Found, classes: ClassTable, **image: Any) -> list[dict[str, Any]]:
    """Detections in COCO's result format.

    Args:
        found: of one image.
        classes: their names and ids.
        image: entries that name the image, such as ``image_id``.
    """
    boxes = found.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    masks = [{}] * len(boxes) if found.masks is None else run_lengths(found.masks).tolist()
    return [
        {
            **image,
            "category_id": classes.dataset_ids[index],
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 5),
            **({"segmentation": mask} if mask else {}),
        }
        for box, score, index, mask in zip(
            boxes.tolist(), found.scores.tolist(), found.classes.tolist(), masks, strict=True
        )
    ]
