"""Which detection finds which object, by the rules of COCO, for all images at once."""

import itertools
from typing import NamedTuple

import numpy as np

from .arrays import Detections, Truth, rank_in_group

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU of COCO's AP; the first is used for all else
BACKGROUND = 0.1  # IoU below which TIDE takes a detection for background
_PAIRS_AT_A_TIME = 4_000_000


class Pairs(NamedTuple):
    """Detections with objects of the same image, of any class, sorted by detection.

    Attributes:
        detection: (P) index of the detection.
        object: (P) index of the object.
        iou: (P) intersection over union; with crowds, over the area of the detection.
    """

    detection: np.ndarray
    object: np.ndarray
    iou: np.ndarray

    def take(self, chosen: np.ndarray) -> "Pairs":
        """Some of the pairs, by indices or a mask."""
        return Pairs(self.detection[chosen], self.object[chosen], self.iou[chosen])


class Matches(NamedTuple):
    """What detections are at each of T IoU thresholds.

    Attributes:
        object: (T, D) index of the object that the detection finds, -1 for none.
        true: (T, D) whether it finds an object that counts.
        ignored: (T, D) whether it counts neither as true nor as false.
        counts: (G) whether the object counts.
    """

    object: np.ndarray
    true: np.ndarray
    ignored: np.ndarray
    counts: np.ndarray


def find_pairs(truth: Truth, detections: Detections, least: float = BACKGROUND) -> Pairs:
    """Find the pairs with an IoU of at least ``least``; the arithmetic is that of pycocotools."""
    bounds = np.searchsorted(truth.image, np.arange(len(truth.files) + 1))
    count = np.diff(bounds)[detections.image]
    parts = [Pairs(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0))]
    ends = np.cumsum(count)
    start = 0
    while start < len(count):
        reached = (ends[start - 1] if start else 0) + _PAIRS_AT_A_TIME
        stop = max(start + 1, int(np.searchsorted(ends, reached, side="right")))
        part = count[start:stop]
        detection = np.repeat(np.arange(start, stop), part)
        offset = np.arange(len(detection)) - np.repeat(np.cumsum(part) - part, part)
        found = bounds[detections.image[detection]] + offset
        iou = _iou(detections.boxes[detection], truth.boxes[found], truth.crowd[found])
        parts.append(Pairs(detection, found, iou).take(iou >= least))
        start = stop
    return Pairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def match(
    truth: Truth, detections: Detections, pairs: Pairs, area: tuple[float, float] = (0, np.inf)
) -> Matches:
    """Match detections with objects of their class, at all of :data:`THRESHOLDS`.

    Detections of an image and class are taken by decreasing score. Each finds the free object of
    the highest IoU, the last one of several; crowds and objects outside of ``area`` are found only
    if no other object is.

    Args:
        truth: the objects.
        detections: of a model.
        pairs: of :func:`find_pairs`.
        area: smallest and largest area in square pixels of objects and detections that count.
    """
    outside = (truth.area < area[0]) | (truth.area > area[1])
    ignored_objects = truth.crowd | outside
    same = detections.label[pairs.detection] == truth.label[pairs.object]
    pairs = pairs.take(same & (pairs.iou >= THRESHOLDS[0]))
    group = detections.image * len(truth.class_names) + detections.label
    found = match_greedily(pairs, group, THRESHOLDS, ignored_objects, truth.crowd)
    by_ignored = (found >= 0) & ignored_objects[found] if len(truth.image) else found >= 0
    box_area = detections.boxes[:, 2] * detections.boxes[:, 3]
    box_outside = (box_area < area[0]) | (box_area > area[1])
    return Matches(
        object=found,
        true=(found >= 0) & ~by_ignored,
        ignored=by_ignored | ((found < 0) & box_outside),
        counts=~ignored_objects,
    )


def match_greedily(
    pairs: Pairs,
    group: np.ndarray,
    thresholds: np.ndarray,
    last: np.ndarray,
    shared: np.ndarray,
) -> np.ndarray:
    """Give each detection of a group, in their order, the free object of the highest IoU.

    Args:
        pairs: that are allowed, sorted by detection.
        group: (D) of each detection; groups have no objects in common.
        thresholds: (T) lowest IoU.
        last: (G) objects that are found only if no other one is.
        shared: (G) objects that any number of detections find.

    Returns:
        (T, D) index of the object, or -1.
    """
    found = np.full((len(thresholds), len(group)), -1, dtype=np.int64)
    taken = np.zeros((len(last), len(thresholds)), dtype=bool)
    lowest = np.minimum(thresholds, 1 - 1e-10)
    candidates, inverse = np.unique(pairs.detection, return_inverse=True)
    step_of_pair = rank_in_group(group[candidates])[inverse]
    order = np.argsort(step_of_pair, kind="stable")
    pairs, step_of_pair = pairs.take(order), step_of_pair[order]
    steps = np.flatnonzero(np.diff(step_of_pair, prepend=-1))
    # All groups at once: one step for the first detection of each, one for the second, ...
    for start, stop in itertools.pairwise([*steps, len(order)]):
        part = pairs.take(np.arange(start, stop))
        free = ~taken[part.object] | shared[part.object, None]
        value = np.where(last[part.object], part.iou - 2, part.iou)[:, None]
        value = np.where(free & (part.iou[:, None] >= lowest), value, -np.inf)
        first = np.flatnonzero(np.diff(part.detection, prepend=-1))
        best = np.maximum.reduceat(value, first, axis=0)
        sizes = np.diff(first, append=len(part.iou))
        is_best = (value == np.repeat(best, sizes, axis=0)) & np.isfinite(value)
        places = np.where(is_best, np.arange(len(part.iou))[:, None], -1)
        chosen = np.maximum.reduceat(places, first, axis=0)  # the last of equals
        row, column = np.nonzero(chosen >= 0)
        objects = part.object[chosen[row, column]]
        found[column, part.detection[first][row]] = objects
        taken[objects, column] = True
    return found


def _iou(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    sides = np.maximum(high - low, 0)
    shared = sides[:, 0] * sides[:, 1]
    area = boxes[:, 2] * boxes[:, 3]
    union = np.where(crowd, area, area + others[:, 2] * others[:, 3] - shared)
    return np.divide(shared, union, out=np.zeros(len(shared)), where=shared > 0)
