"""Precision, recall and F1 at each score, and the threshold with the highest F1."""

import dataclasses

import numpy as np

from .average_precision import RECALLS, Marks


@dataclasses.dataclass(frozen=True)
class Curve:
    """Detections with a score of at least each of n values, by decreasing score.

    Attributes:
        score: (n) different scores.
        true: (n) number of true detections.
        found: (n) number of detections, true and false.
        objects: number of objects.
    """

    score: np.ndarray
    true: np.ndarray
    found: np.ndarray
    objects: int

    @property
    def precision(self) -> np.ndarray:
        """Share of the detections that are true."""
        return self.true / np.maximum(self.found, 1)

    @property
    def recall(self) -> np.ndarray:
        """Share of the objects that are found."""
        return self.true / max(self.objects, 1)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall."""
        return 2 * self.true / np.maximum(self.found + self.objects, 1)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a detector does at a threshold; the shares are None where they are not defined."""

    threshold: float
    true: int
    false: int
    missed: int

    @property
    def precision(self) -> float | None:
        """Share of the detections that are true."""
        found = self.true + self.false
        return self.true / found if found else None

    @property
    def recall(self) -> float | None:
        """Share of the objects that are found."""
        objects = self.true + self.missed
        return self.true / objects if objects else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall."""
        total = 2 * self.true + self.false + self.missed
        return 2 * self.true / total if total else None


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Thresholds chosen on one part of the images and verified on the other one.

    Attributes:
        chosen: of all classes together.
        on_choice: at that threshold, the images on which it was chosen.
        verified: at that threshold, the other images.
        classes: (K) of each class, on the other images; None without true detections in the first
            part.
    """

    chosen: float
    on_choice: Operation
    verified: Operation
    classes: list[Operation | None]


def curve_of(
    marks: Marks,
    score: np.ndarray,
    *,
    label: int | None = None,
    images: np.ndarray | None = None,
) -> Curve:
    """Count true and false detections at each score, at the first IoU threshold.

    Args:
        marks: of the detections.
        score: (D) of the detections, decreasing.
        label: of a class; None: all classes.
        images: (N) bool, which images count; None: all.
    """
    kept, objects = ~marks.ignored[0], np.ones(len(marks.object_label), dtype=bool)
    if label is not None:
        kept, objects = kept & (marks.label == label), marks.object_label == label
    if images is not None:
        kept, objects = kept & images[marks.image], objects & images[marks.object_image]
    scores, true = score[kept], marks.true[0][kept]
    last = np.flatnonzero(np.diff(scores, append=-1.0))
    return Curve(scores[last], np.cumsum(true)[last], last + 1, int(objects.sum()))


def best_threshold(curve: Curve) -> float | None:
    """Find the threshold with the highest F1: midway to the next lower score.

    Returns:
        The threshold; None if no detection is true.
    """
    if not len(curve.score) or not curve.true[-1]:
        return None
    best = int(curve.f1.argmax())
    lower = curve.score[best + 1] if best + 1 < len(curve.score) else 0.0
    return float(curve.score[best] + lower) / 2


def operate(curve: Curve, threshold: float) -> Operation:
    """Count true, false and missed at a threshold."""
    count = int((curve.score >= threshold).sum())
    true, found = (int(x[count - 1]) if count else 0 for x in (curve.true, curve.found))
    return Operation(threshold, true, found - true, curve.objects - true)


def choose_thresholds(marks: Marks, score: np.ndarray, images: int, *, seed: int) -> Thresholds:
    """Choose thresholds on a random half of the images, and verify them on the other half.

    Args:
        marks: of the detections.
        score: (D) of the detections.
        images: number of images.
        seed: of the halves.
    """
    first = ~verified_images(images, seed)
    choice = curve_of(marks, score, images=first)
    threshold = best_threshold(choice)
    threshold = 0.5 if threshold is None else threshold
    classes: list[Operation | None] = []
    for label in range(marks.classes):
        best = best_threshold(curve_of(marks, score, label=label, images=first))
        other = curve_of(marks, score, label=label, images=~first)
        classes.append(None if best is None else operate(other, best))
    return Thresholds(
        chosen=threshold,
        on_choice=operate(choice, threshold),
        verified=operate(curve_of(marks, score, images=~first), threshold),
        classes=classes,
    )


def verified_images(images: int, seed: int) -> np.ndarray:
    """The images (N) bool on which thresholds are verified, a random half."""
    second = np.ones(images, dtype=bool)
    second[np.random.default_rng(seed).permutation(images)[: (images + 1) // 2]] = False
    return second


def precision_at_recalls(curve: Curve) -> np.ndarray:
    """Precision at COCO's 101 recalls, 0 where the recall is not reached; its mean is the AP50."""
    envelope = np.append(np.maximum.accumulate(curve.precision[::-1])[::-1], 0)
    return envelope[np.searchsorted(curve.recall, RECALLS)]


def f1_at(curve: Curve, thresholds: np.ndarray) -> np.ndarray:
    """F1 at some thresholds."""
    count = np.searchsorted(-curve.score, -thresholds, side="right")
    return np.append(0, curve.f1)[count]
