"""Objects and detections of a whole data set as flat arrays."""

import dataclasses

import numpy as np

MAX_DETECTIONS = 100  # of an image and class, as COCO's tools evaluate


@dataclasses.dataclass(frozen=True)
class Truth:
    """The G objects of a data set of N images and K classes, sorted by image.

    Attributes:
        class_names: (K) names.
        files: (N) paths of the images, in the order of their ids.
        sizes: (N, 2) height and width in pixels.
        image: (G) index of the image.
        label: (G) index of the class.
        boxes: (G, 4) float64, x, y, width and height in pixels.
        area: (G) square pixels, as in the annotation file.
        crowd: (G) whether it is a region with many objects, in which detections are ignored.
    """

    class_names: list[str]
    files: list[str]
    sizes: np.ndarray
    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


@dataclasses.dataclass(frozen=True)
class Detections:
    """The D detections of a model, by decreasing score; make them with :func:`sort_detections`.

    An image and class have at most :data:`MAX_DETECTIONS`.

    Attributes:
        image: (D) index of the image.
        label: (D) index of the class.
        boxes: (D, 4) float64, x, y, width and height in pixels.
        score: (D) in [0, 1].
        rank: (D) number of detections of the same image and class before it.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    score: np.ndarray
    rank: np.ndarray


def sort_detections(
    image: np.ndarray, label: np.ndarray, boxes: np.ndarray, score: np.ndarray
) -> Detections:
    """Sort detections as pycocotools does: by score, then by image, then as they come.

    Of each image and class, the best :data:`MAX_DETECTIONS` are kept.

    Args:
        image: (D) index of the image.
        label: (D) index of the class.
        boxes: (D, 4) x, y, width and height in pixels.
        score: (D) in [0, 1].
    """
    order = np.lexsort((image, -score))
    image, label = image[order].astype(np.int64), label[order].astype(np.int64)
    rank = rank_in_group(image * (label.max(initial=0) + 1) + label)
    kept = rank < MAX_DETECTIONS
    order = order[kept]
    boxes, score = boxes[order].astype(float), score[order].astype(float)
    return Detections(image[kept], label[kept], boxes, score, rank[kept])


def rank_in_group(group: np.ndarray) -> np.ndarray:
    """Count, for each element, the earlier ones of the same group.

    Args:
        group: (n) integers.
    """
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    sizes = np.diff(starts, append=len(group))
    ranks = np.empty(len(group), dtype=np.int64)
    ranks[order] = np.arange(len(group)) - np.repeat(starts, sizes)
    return ranks
