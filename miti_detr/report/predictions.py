"""The detections of a model on the images of a data set."""

from collections.abc import Callable

import numpy as np

from miti_detr.predict.predictor import DetectionPredictor

from .arrays import Detections, Truth, sort_detections

_CHUNK = 64  # images that are read at a time


def detect_all(
    predictor: DetectionPredictor,
    truth: Truth,
    *,
    advance: Callable[[int], object] = lambda count: None,
) -> Detections:
    """Detect objects in all images, with the boxes that Detectron2's evaluators compare.

    Args:
        predictor: with the threshold 0.
        truth: the data set.
        advance: called with the number of images that were done.

    Returns:
        The detections whose class the data set has.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the classes of the model are not those of the data set, an image has another
            size than its annotation file says, or a detection is not finite.
    """
    to_label = match_classes(predictor.class_names, truth.class_names)
    parts = []
    for start in range(0, len(truth.files), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(truth.files)))
        results = predictor([truth.files[index] for index in chunk])
        for index, result in zip(chunk, results, strict=True):
            if tuple(result.image_size) != tuple(truth.sizes[index]):
                raise ValueError(
                    f"{truth.files[index]} is {_size(result.image_size)} pixels, its annotation "
                    f"file says {_size(truth.sizes[index])}. Correct the file."
                )
            boxes, scores, classes = result.found()[:3]
            if not np.isfinite(boxes).all():
                raise ValueError(
                    f"detections in {truth.files[index]} are not finite. The weights may have "
                    "diverged."
                )
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
            labels = to_label[classes]
            rows = np.column_stack([np.full(len(boxes), index), labels, boxes, scores])
            parts.append(rows[labels >= 0].astype(np.float64))
        advance(len(chunk))
    rows = np.concatenate(parts)
    return sort_detections(rows[:, 0], rows[:, 1], rows[:, 2:6], rows[:, 6])


def match_classes(model: list[str], dataset: list[str]) -> np.ndarray:
    """Find the label of each class of a model: by name, or by order if its names are not known.

    Args:
        model: names of the K' classes of the model; numbers if they are not known.
        dataset: names of the K classes of the data set.

    Returns:
        (K') label, or -1 for a class that the data set does not have.

    Raises:
        ValueError: the data set has a class that the model does not have.
    """
    unnamed = model == [str(index) for index in range(len(model))]
    if unnamed and len(model) == len(dataset):
        return np.arange(len(model))
    unknown = [name for name in dataset if name not in model]
    if unknown:
        raise ValueError(
            f"the data set has the class {unknown[0]!r}, but the classes of the model are "
            f"{', '.join(model[:20])}. Use a data set with the classes of the model."
        )
    return np.array([dataset.index(name) if name in dataset else -1 for name in model])


def _size(size: np.ndarray | tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
