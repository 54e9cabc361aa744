"""The tables of a report. Shares are in percent, like AP."""

from collections.abc import Sequence

import numpy as np

from .bootstrap import Samples, interval
from .calibration import BINS
from .errors import FALSE_KINDS, KINDS
from .evaluation import Evaluation, Group
from .page import Cell, Table
from .thresholds import Operation

DEFAULT = 0.5  # threshold that is used where none is chosen


def coco_table(evaluation: Evaluation, samples: Samples) -> Table:
    """AP and AR as COCO defines them, with intervals of AP and AP50."""
    values: dict[str, Cell] = {
        **evaluation.coco,
        "AP": _with_interval(evaluation.coco["AP"], samples.ap),
        "AP50": _with_interval(evaluation.coco["AP50"], samples.ap50),
    }
    rows: list[list[Cell]] = [[name, value] for name, value in values.items()]
    return Table(
        "coco",
        "AP and AR of COCO",
        ["metric", "value [95 % interval]"],
        rows,
        note=f"Of boxes, in percent. Intervals are percentiles of {len(samples.ap):,} resamples of "
        "the images.",
    )


def difference_table(
    names: tuple[str, str], values: tuple[Evaluation, Evaluation], samples: Sequence[Samples]
) -> Table:
    """AP of two models and their paired difference."""
    rows: list[list[Cell]] = []
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "AP": (samples[0].ap, samples[1].ap),
        "AP50": (samples[0].ap50, samples[1].ap50),
    }
    for name, (first, second) in pairs.items():
        difference = values[0].coco[name] - values[1].coco[name]
        low, high = interval(first - second)
        cell: Cell = {"mean": difference, "low": low, "high": high, "n": len(first)}
        rows.append([name, values[0].coco[name], values[1].coco[name], cell])
    for label, class_name in enumerate(values[0].truth.class_names):
        one, other = (float(value.class_ap[label]) for value in values)
        low, high = interval(samples[0].classes[:, label] - samples[1].classes[:, label])
        cell = {"mean": one - other, "low": low, "high": high, "n": len(samples[0].ap)}
        rows.append([f"AP of {class_name}", one, other, None if np.isnan(one - other) else cell])
    return Table(
        "difference",
        "Difference of two models",
        ["metric", *names, "difference [95 % interval]"],
        rows,
        note="Both models see the same resamples of the images. An interval without 0 means that "
        "the difference is larger than the choice of the images explains.",
    )


def class_table(evaluation: Evaluation, samples: Samples) -> Table:
    """Each class, at its own best threshold."""
    rows: list[list[Cell]] = []
    objects = np.bincount(evaluation.marks.object_label, minlength=evaluation.marks.classes)
    for label, name in enumerate(evaluation.truth.class_names):
        best = evaluation.thresholds.classes[label]
        rows.append(
            [
                name,
                int(objects[label]),
                _with_interval(float(evaluation.class_ap[label]), samples.classes[:, label]),
                float(evaluation.class_ap50[label]),
                float(evaluation.class_ar[label]),
                None if best is None else f"{best.threshold:.3f}",
                *_shares(best),
            ]
        )
    ap = ["AP [95 % interval]", "AP50", "AR"]
    columns = ["class", "objects", *ap, "threshold", "precision", "recall", "F1"]
    note = (
        "The threshold of a class has the highest F1 on one half of the images; precision, recall "
        "and F1 are those of the other half, at IoU 0.5."
    )
    return Table("classes", "Each class", columns, rows, digits=1, note=note)


def threshold_table(evaluation: Evaluation, default: Operation) -> Table:
    """The chosen threshold, on both halves, and the default one."""
    found = evaluation.thresholds
    names = ("chosen", "chosen, verified", f"{DEFAULT:g}, for comparison")
    halves = ("first", "second", "second")
    rows: list[list[Cell]] = [
        [name, half, f"{o.threshold:.3f}", o.true, o.false, o.missed, *_shares(o)]
        for name, half, o in zip(
            names, halves, (found.on_choice, found.verified, default), strict=True
        )
    ]
    columns = ["threshold", "half", "value", "true", "false", "missed", "precision", "recall", "F1"]
    note = (
        "The threshold with the highest F1 over all classes on a random half of the images, and "
        "what it does on the other half. All parts below use it."
    )
    return Table("threshold", "Chosen and verified", columns, rows, digits=1, note=note)


def calibration_table(evaluation: Evaluation) -> Table:
    """Score and precision of the bins."""
    found = evaluation.calibration[0]
    rows: list[list[Cell]] = [
        [
            f"{index / BINS:.1f} to {(index + 1) / BINS:.1f}",
            int(found.count[index]),
            100 * float(found.score[index]),
            100 * float(found.precision[index]),
        ]
        for index in range(BINS)
    ]
    errors = [100 * calibration.error for calibration in evaluation.calibration]
    note = (
        f"The expected calibration error is {errors[0]:.2f} % for all detections and "
        f"{errors[1]:.2f} % for those with a score of at least {evaluation.thresholds.chosen:.3f}. "
        "It is the mean difference between the score and the share of true detections, over bins."
    )
    columns = ["scores", "detections", "mean score", "true"]
    return Table(
        "calibration", "Scores and shares of true detections", columns, rows, digits=1, note=note
    )


def error_table(evaluation: Evaluation) -> Table:
    """Kinds of errors."""
    everything, sure = (errors.counts() for errors in evaluation.errors)
    false = max(sum(sure[kind] for kind in FALSE_KINDS), 1)
    rows: list[list[Cell]] = [
        [
            kind,
            evaluation.costs[kind],
            sure[kind],
            100 * sure[kind] / false if kind in FALSE_KINDS else None,
            everything[kind],
        ]
        for kind in KINDS
    ]
    rows += [
        [f"all {kind}", evaluation.costs[kind], None, None, None]
        for kind in ("false positives", "false negatives")
    ]
    note = (
        "Kinds and costs as TIDE defines them: a cost is the rise of AP50 if errors of only that "
        "kind were corrected, at all scores, so costs do not add up. class: right place, wrong "
        "class. localisation: right class, IoU with the object from 0.1 to 0.5. both: wrong class "
        "and place. duplicate: the object has been found. background: no object, IoU up to 0.1. "
        "missed: objects for which there is no detection that one of the first two corrections "
        "would make true."
    )
    columns = ["error", "cost in AP50", "count", "% of false", "count at all scores"]
    return Table("errors", "Kinds of errors", columns, rows, digits=2, note=note)


def group_table(key: str, title: str, header: str, groups: Sequence[Group], note: str) -> Table:
    """Groups of images or objects."""
    of_images = any(group.images is not None for group in groups)
    rows: list[list[Cell]] = [
        [
            group.name,
            *([group.images] if of_images else []),
            group.objects,
            *group.ap,
            *_shares(group.operation),
        ]
        for group in groups
    ]
    images = ["images"] if of_images else []
    columns = [header, *images, "objects", "AP", "AP50", "precision", "recall", "F1"]
    return Table(key, title, columns, rows, digits=1, note=note)


def _with_interval(value: float, samples: np.ndarray) -> Cell:
    if np.isnan(value):
        return None
    low, high = interval(samples)
    return {"mean": value, "low": low, "high": high, "n": len(samples), "is_difference": False}


def _shares(operation: Operation | None) -> list[Cell]:
    if operation is None:
        return [None, None, None]
    values = operation.precision, operation.recall, operation.f1
    return [None if value is None else 100 * value for value in values]
