"""Average precision of weighted images, fast enough for thousands of resamples."""

import dataclasses

import numpy as np

from .arrays import MAX_DETECTIONS, Detections, Truth
from .matching import Matches, Pairs, match

RECALLS = np.linspace(0, 1, 101)  # at which COCO's AP takes the precision
# COCO's recalls are products such as 57 * 0.01, some of which are above 57 / 100.
_ABOVE = np.arange(101) / 100 < RECALLS
AREAS = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}


@dataclasses.dataclass(frozen=True)
class Marks:
    """What AP is computed from.

    Attributes:
        image: (D) image of each detection, by decreasing score.
        label: (D) class of each detection.
        true: (T, D) whether it finds an object.
        ignored: (T, D) whether it counts neither as true nor as false.
        object_image: (G) image of each object that counts.
        object_label: (G) class of each object that counts.
        classes: number of classes K.
    """

    image: np.ndarray
    label: np.ndarray
    true: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_label: np.ndarray
    classes: int


class PrecisionCounter:
    """Computes AP and recall when each image counts an integer number of times.

    Images that count twice give the numbers of a data set in which they occur twice. What does not
    depend on the counts is computed once: detections are sorted by class, and only true ones are
    looked at, since the precision is highest there.
    """

    def __init__(self, marks: Marks) -> None:
        """Sort the detections of each class."""
        order = np.argsort(marks.label, kind="stable")
        label = marks.label[order]
        true, ignored = marks.true[:, order] & ~marks.ignored[:, order], marks.ignored[:, order]
        starts = np.searchsorted(label, np.arange(marks.classes))
        threshold, self._place = np.nonzero(true)
        self._shape = (len(true), marks.classes)
        self._segment = threshold * marks.classes + label[self._place]
        self._class_start = starts[label[self._place]]
        segments = np.arange(len(true) * marks.classes)
        self._first = np.searchsorted(self._segment, segments)[self._segment]
        self._offset = 2.0 * (len(segments) - self._segment)
        # Ignored detections are few; they are taken off the sum over all.
        ignored_threshold, self._ignored_place = np.nonzero(ignored)
        key = ignored_threshold * len(label) + self._ignored_place
        self._ignored_stop = np.searchsorted(key, threshold * len(label) + self._place)
        self._ignored_start = np.searchsorted(key, threshold * len(label) + self._class_start)
        self._image = marks.image[order]
        self._object_image, self._object_label = marks.object_image, marks.object_label

    def __call__(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute AP and recall.

        Args:
            counts: (N) int64, how often each image counts.

        Returns:
            (T, K) average precision and (T, K) recall in [0, 1]; NaN for classes without objects.
        """
        weight = counts[self._image]
        positives = np.bincount(
            self._object_label, counts[self._object_image], minlength=self._shape[1]
        ).astype(np.int64)
        positives = np.tile(positives, self._shape[0])  # of each segment
        true_sum = _sums(weight[self._place])
        true = true_sum[1:] - true_sum[self._first]
        all_sum, ignored_sum = _sums(weight), _sums(weight[self._ignored_place])
        found = all_sum[self._place + 1] - all_sum[self._class_start]
        found -= ignored_sum[self._ignored_stop] - ignored_sum[self._ignored_start]
        precision = true / np.maximum(found, 1)
        # The highest precision from here to the end of the segment
        envelope = np.maximum.accumulate((precision + self._offset)[::-1])[::-1] - self._offset
        reached = _recalls_reached(true, np.maximum(positives[self._segment], 1))
        before = np.concatenate([[0], reached])[:-1]
        before[self._first] = 0
        gained = envelope * (reached - before)
        ap = np.bincount(self._segment, gained, minlength=len(positives)) / len(RECALLS)
        total = np.bincount(self._segment, weight[self._place], minlength=len(positives))
        with np.errstate(invalid="ignore"):
            recall = total / positives
        ap[positives == 0] = np.nan
        recall[positives == 0] = np.nan
        return ap.reshape(self._shape), recall.reshape(self._shape)


def marks_of(
    truth: Truth, detections: Detections, matches: Matches, most: int = MAX_DETECTIONS
) -> Marks:
    """Take the best ``most`` detections of each image and class."""
    kept = detections.rank < most
    return Marks(
        image=detections.image[kept],
        label=detections.label[kept],
        true=matches.true[:, kept],
        ignored=matches.ignored[:, kept],
        object_image=truth.image[matches.counts],
        object_label=truth.label[matches.counts],
        classes=len(truth.class_names),
    )


def coco_statistics(truth: Truth, detections: Detections, pairs: Pairs) -> dict[str, float]:
    """Compute COCO's twelve numbers, in 0..100; NaN where there are no objects.

    Args:
        truth: the objects.
        detections: of a model.
        pairs: of :func:`~miti_detr.report.matching.find_pairs`.
    """
    once = np.ones(len(truth.files), dtype=np.int64)
    ap, recall = {}, {}
    for name, area in AREAS.items():
        matches = match(truth, detections, pairs, area)
        ap[name], recall[name] = PrecisionCounter(marks_of(truth, detections, matches))(once)
        for most in (1, 10) if name == "all" else ():
            marks = marks_of(truth, detections, matches, most)
            recall[str(most)] = PrecisionCounter(marks)(once)[1]
    found = {"AP": ap["all"], "AP50": ap["all"][:1], "AP75": ap["all"][5:6]}
    found |= {"APs": ap["small"], "APm": ap["medium"], "APl": ap["large"]}
    found |= {"AR1": recall["1"], "AR10": recall["10"], "AR": recall["all"]}
    found |= {"ARs": recall["small"], "ARm": recall["medium"], "ARl": recall["large"]}
    return {name: 100 * mean(values) for name, values in found.items()}


def mean(values: np.ndarray) -> float:
    """Mean of the values that are numbers; NaN if there are none."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def _recalls_reached(true: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """How many of :data:`RECALLS` are at most ``true / positives``, as floats compare."""
    whole, remainder = np.divmod(100 * true, positives)
    return whole + 1 - ((remainder == 0) & _ABOVE[whole])


def _sums(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, ... values."""
    return np.concatenate([[0], np.cumsum(values)])
