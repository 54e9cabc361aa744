"""All numbers of the report of one model."""

import dataclasses

import numpy as np

from .arrays import Detections, Truth
from .average_precision import (
    AREAS,
    Marks,
    PrecisionCounter,
    coco_statistics,
    marks_of,
    mean,
)
from .calibration import Calibration, calibrate
from .confusion import confusion_matrix
from .errors import Errors, costs, find_errors
from .matching import Matches, find_pairs, match
from .thresholds import Operation, Thresholds, choose_thresholds, curve_of, operate

OBJECTS = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, None))  # groups of images


@dataclasses.dataclass(frozen=True)
class Group:
    """Some images, or the objects of some sizes.

    Attributes:
        name: in words.
        images: number of images; None if the group is of objects.
        objects: number of objects.
        ap: AP and AP50 in 0..100; NaN without objects.
        operation: at the chosen threshold.
    """

    name: str
    images: int | None
    objects: int
    ap: tuple[float, float]
    operation: Operation


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model on a data set.

    Attributes:
        truth: the objects.
        detections: of the model.
        marks: true and false detections.
        matches: objects that they find.
        counter: of AP.
        coco: the twelve numbers of COCO, in 0..100.
        class_ap: (K) AP of each class, in 0..100.
        class_ap50: (K) AP50.
        class_ar: (K) AR.
        thresholds: the best ones.
        confusion: (K + 1, K + 1) matrix at the chosen threshold.
        calibration: of all detections, and of those from the threshold on.
        errors: of all detections, and of those from the threshold on.
        costs: AP50 that each kind of error costs.
        sizes: by size of the objects.
        crowding: by number of objects in the image.
    """

    truth: Truth
    detections: Detections
    marks: Marks
    matches: Matches
    counter: PrecisionCounter
    coco: dict[str, float]
    class_ap: np.ndarray
    class_ap50: np.ndarray
    class_ar: np.ndarray
    thresholds: Thresholds
    confusion: np.ndarray
    calibration: tuple[Calibration, Calibration]
    errors: tuple[Errors, Errors]
    costs: dict[str, float]
    sizes: list[Group]
    crowding: list[Group]

    def false_and_missed(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (N) of false detections and missed objects of each image, at the threshold."""
        kept = self.detections.score >= self.thresholds.chosen
        false = kept & ~self.matches.true[0] & ~self.matches.ignored[0]
        missed = self.matches.counts & ~self.errors[1].found
        images = len(self.truth.files)
        return (
            np.bincount(self.detections.image[false], minlength=images),
            np.bincount(self.truth.image[missed], minlength=images),
        )


def evaluate(truth: Truth, detections: Detections, *, seed: int = 0) -> Evaluation:
    """Compute all numbers of a report.

    Args:
        truth: the objects.
        detections: of the model.
        seed: of the halves on which thresholds are chosen and verified.
    """
    pairs = find_pairs(truth, detections)
    matches = match(truth, detections, pairs)
    marks = marks_of(truth, detections, matches)
    counter = PrecisionCounter(marks)
    ap, recall = counter(np.ones(len(truth.files), dtype=np.int64))
    thresholds = choose_thresholds(marks, detections.score, len(truth.files), seed=seed)
    chosen = thresholds.chosen
    errors = find_errors(truth, detections, pairs, matches)
    coco, sizes = coco_statistics(truth, detections, pairs), []
    for name, area in list(AREAS.items())[1:]:
        of_size = marks_of(truth, detections, match(truth, detections, pairs, area))
        sizes.append(_by_size(name, of_size, detections.score, chosen, len(truth.files)))
    return Evaluation(
        truth=truth,
        detections=detections,
        marks=marks,
        matches=matches,
        counter=counter,
        coco=coco,
        class_ap=100 * ap.mean(axis=0),
        class_ap50=100 * ap[0],
        class_ar=100 * recall.mean(axis=0),
        thresholds=thresholds,
        confusion=confusion_matrix(truth, detections, pairs, matches, chosen),
        calibration=_calibrations(marks, detections.score, chosen),
        errors=(errors, find_errors(truth, detections, pairs, matches, chosen)),
        costs=costs(marks, truth, errors),
        sizes=sizes,
        crowding=_by_crowding(truth, marks, counter, detections.score, chosen),
    )


def _calibrations(
    marks: Marks, score: np.ndarray, threshold: float
) -> tuple[Calibration, Calibration]:
    counted = ~marks.ignored[0]
    sure = counted & (score >= threshold)
    return (
        calibrate(score[counted], marks.true[0][counted]),
        calibrate(score[sure], marks.true[0][sure]),
    )


def _by_size(name: str, marks: Marks, score: np.ndarray, threshold: float, images: int) -> Group:
    ap, _ = PrecisionCounter(marks)(np.ones(images, dtype=np.int64))
    operation = operate(curve_of(marks, score), threshold)
    pair = 100 * mean(ap), 100 * mean(ap[0])
    return Group(name, None, len(marks.object_label), pair, operation)


def _by_crowding(
    truth: Truth,
    marks: Marks,
    counter: PrecisionCounter,
    score: np.ndarray,
    threshold: float,
) -> list[Group]:
    objects = np.bincount(marks.object_image, minlength=len(truth.files))
    groups = []
    for low, high in OBJECTS:
        chosen = (objects >= low) & (objects <= (np.inf if high is None else high))
        if not chosen.any():
            continue
        ap, _ = counter(chosen.astype(np.int64))
        operation = operate(curve_of(marks, score, images=chosen), threshold)
        name = f"{low}" if high == low else f"{low} or more" if high is None else f"{low} to {high}"
        pair = 100 * mean(ap), 100 * mean(ap[0])
        groups.append(Group(name, int(chosen.sum()), int(objects[chosen].sum()), pair, operation))
    return groups
