"""Kinds of errors and what they cost, as TIDE defines them.

Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV 2020, with its
thresholds of 0.5 for the foreground and 0.1 for the background.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from .arrays import Detections, Truth
from .average_precision import Marks, PrecisionCounter
from .matching import BACKGROUND, THRESHOLDS, Matches, Pairs

FALSE_KINDS = ("class", "localisation", "both", "duplicate", "background")
KINDS = (*FALSE_KINDS, "missed")
NO_ERROR = -1
CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND_KIND = range(len(FALSE_KINDS))


@dataclasses.dataclass(frozen=True)
class Errors:
    """The kind of each error.

    Attributes:
        kind: (D) index into :data:`FALSE_KINDS`, or :data:`NO_ERROR` for detections that are true
            or left out.
        target: (D) object that the detection would find without the error, for ``class`` and
            ``localisation``; otherwise -1.
        found: (G) objects that are found.
        missed: (G) objects that are not found and not the target of an error.
    """

    kind: np.ndarray
    target: np.ndarray
    found: np.ndarray
    missed: np.ndarray

    def counts(self) -> dict[str, int]:
        """Number of errors of each kind."""
        numbers = {name: int((self.kind == i).sum()) for i, name in enumerate(FALSE_KINDS)}
        return numbers | {"missed": int(self.missed.sum())}


class _Best(NamedTuple):
    """The object of the highest IoU for each detection, the first of several."""

    iou: np.ndarray
    object: np.ndarray


def find_errors(
    truth: Truth,
    detections: Detections,
    pairs: Pairs,
    matches: Matches,
    threshold: float = 0.0,
) -> Errors:
    """Find the kind of each false detection, and the missed objects.

    The first that applies: ``localisation``: IoU with an object of its class from 0.1 to 0.5;
    ``class``: IoU with an object of another class of 0.5 or more; ``duplicate``: the object of its
    class has been found; ``background``: no IoU above 0.1; otherwise ``both``.

    Args:
        truth: the objects.
        detections: of a model.
        pairs: of :func:`~miti_detr.report.matching.find_pairs`.
        matches: of :func:`~miti_detr.report.matching.match`.
        threshold: lowest score of the detections that are considered.
    """
    kept = detections.score >= threshold
    true = kept & matches.true[0]
    found = np.zeros(len(truth.image), dtype=bool)
    found[matches.object[0][true]] = True
    false = kept & ~matches.true[0] & ~matches.ignored[0]
    pairs = pairs.take(false[pairs.detection] & ~truth.crowd[pairs.object])
    same = detections.label[pairs.detection] == truth.label[pairs.object]
    own = _best(pairs.take(same), len(false))
    other = _best(pairs.take(~same), len(false))
    positive = THRESHOLDS[0]
    conditions = [
        ~false,
        (own.iou >= BACKGROUND) & (own.iou <= positive),
        other.iou >= positive,
        own.iou >= positive,
        np.maximum(own.iou, other.iou) <= BACKGROUND,
    ]
    kinds = [NO_ERROR, LOCALISATION, CLASS, DUPLICATE, BACKGROUND_KIND]
    kind = np.select(conditions, kinds, default=BOTH)
    target = np.select([kind == LOCALISATION, kind == CLASS], [own.object, other.object], -1)
    correctable = np.zeros(len(truth.image), dtype=bool)
    correctable[target[target >= 0]] = True
    missed = matches.counts & ~found & ~correctable
    return Errors(kind, target, found, missed)


def costs(marks: Marks, truth: Truth, errors: Errors) -> dict[str, float]:
    """How much AP50 rises where the errors of one kind are corrected, in 0..100, at least 0.

    Of the false detections of both kinds with one target, the one with the highest score becomes
    true, unless the target has been found; all others are left out. Missed objects are left out.
    ``false positives`` is the rise without any false detection, ``false negatives`` that without
    any object that is not found.

    Args:
        marks: of all detections and images.
        truth: the objects.
        errors: of all detections.
    """
    base = ap50(marks, truth, marks.object_label)
    values = {}
    for index, name in enumerate(FALSE_KINDS):
        corrected = _correct(marks, truth, errors, index)
        values[name] = ap50(corrected, truth, marks.object_label) - base
    counting = np.flatnonzero(~truth.crowd)
    without = {"missed": ~errors.missed[counting], "false negatives": errors.found[counting]}
    false = marks.ignored[:1] | ~marks.true[:1]
    only_true = dataclasses.replace(marks, true=marks.true[:1], ignored=false)
    values["false positives"] = ap50(only_true, truth, marks.object_label) - base
    for name, kept in without.items():
        fewer = dataclasses.replace(
            marks, object_image=marks.object_image[kept], object_label=marks.object_label[kept]
        )
        values[name] = ap50(fewer, truth, marks.object_label) - base
    return {name: 100 * max(value, 0.0) for name, value in values.items()}


def ap50(marks: Marks, truth: Truth, object_label: np.ndarray) -> float:
    """AP50 in 0..1, the mean over the classes of ``object_label``; a class without objects has 0.

    Args:
        marks: with the first IoU threshold.
        truth: the objects.
        object_label: (G') class of each object, also of those that are left out of ``marks``.
    """
    first = dataclasses.replace(marks, true=marks.true[:1], ignored=marks.ignored[:1])
    counts = np.ones(len(truth.files), dtype=np.int64)
    ap, _ = PrecisionCounter(first)(counts)
    return float(np.nan_to_num(ap[0])[np.unique(object_label)].mean())


def _correct(marks: Marks, truth: Truth, errors: Errors, kind: int) -> Marks:
    wrong = errors.kind == kind
    true, ignored, label = marks.true[:1].copy(), marks.ignored[:1].copy(), marks.label.copy()
    ignored[0, wrong] = True
    candidates = np.flatnonzero(errors.target >= 0)
    candidates = candidates[~errors.found[errors.target[candidates]]]
    # Detections are sorted by score: the first one of an object, of either kind, may become true.
    _, first = np.unique(errors.target[candidates], return_index=True)
    corrected = candidates[first]
    corrected = corrected[wrong[corrected]]
    true[0, corrected], ignored[0, corrected] = True, False
    label[corrected] = truth.label[errors.target[corrected]]
    return dataclasses.replace(marks, label=label, true=true, ignored=ignored)


def _best(pairs: Pairs, detections: int) -> _Best:
    order = np.lexsort((pairs.object, -pairs.iou, pairs.detection))
    pairs = pairs.take(order)
    detection, first = np.unique(pairs.detection, return_index=True)
    iou, found = np.zeros(detections), np.full(detections, -1, dtype=np.int64)
    iou[detection], found[detection] = pairs.iou[first], pairs.object[first]
    return _Best(iou, found)
