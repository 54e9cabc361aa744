"""The figures of a report."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from miti_detr.visualize.curves import COLOURS

from .average_precision import RECALLS
from .calibration import BINS
from .evaluation import Evaluation
from .page import Figure
from .panels import draw_panel
from .thresholds import curve_of, f1_at, precision_at_recalls

SHOWN = 7  # classes whose curves are drawn, those with the most objects
SCORES = np.linspace(0, 1, 101)

Curves = dict[str, dict[str, list[float]]]


def make_curves(evaluation: Evaluation) -> Curves:
    """Precision at 101 recalls and F1 at 101 thresholds, of all classes together and of each.

    Precision of ``all classes`` is the mean over the classes with objects, as in AP50; F1 is that
    of all detections.
    """
    marks, score = evaluation.marks, evaluation.detections.score
    precision: dict[str, list[float]] = {}
    f1: dict[str, list[float]] = {}
    f1["all classes"] = f1_at(curve_of(marks, score), SCORES).tolist()
    for label in np.unique(marks.object_label).tolist():
        curve = curve_of(marks, score, label=label)
        name = evaluation.truth.class_names[label]
        precision[name] = precision_at_recalls(curve).tolist()
        f1[name] = f1_at(curve, SCORES).tolist()
    mean = np.mean(list(precision.values()), axis=0).tolist()
    return {"precision": {"all classes": mean, **precision}, "f1": f1}


def draw_figures(evaluation: Evaluation, curves: Curves, folder: Path) -> list[Figure]:
    """Draw the precision-recall, F1 and reliability panels.

    Args:
        evaluation: the numbers.
        curves: of :func:`make_curves`.
        folder: folder for the PNGs.
    """
    labels, counts = np.unique(evaluation.marks.object_label, return_counts=True)
    largest = labels[np.argsort(-counts, kind="stable")][:SHOWN]
    names = [evaluation.truth.class_names[label] for label in largest.tolist()]
    chosen = evaluation.thresholds.chosen
    of = "each class" if len(names) == len(labels) else f"the {SHOWN} classes with most objects"
    panels = {
        "precision": (
            f"Precision and recall at IoU 0.5: the mean over classes, and {of}.",
            lambda axis: _draw_lines(axis, RECALLS, curves["precision"], names, "recall"),
        ),
        "f1": (
            f"F1 at each threshold. The dotted line is the chosen one, {chosen:.3f}.",
            lambda axis: _draw_lines(axis, SCORES, curves["f1"], names, "threshold", chosen),
        ),
        "reliability": (
            "Share of true detections at IoU 0.5 by score. On the diagonal, scores are "
            "probabilities.",
            lambda axis: _draw_reliability(axis, evaluation),
        ),
    }
    figures = []
    for key, (caption, draw) in panels.items():
        if draw_panel(folder / f"{key}.png", draw):
            figures.append(Figure(folder / f"{key}.png", caption))
    return figures


def _draw_lines(
    axis: Axes,
    x: np.ndarray,
    curves: dict[str, list[float]],
    names: list[str],
    label: str,
    mark: float | None = None,
) -> bool:
    for index, name in enumerate(names):
        axis.plot(x, curves[name], color=COLOURS[index % len(COLOURS)], lw=1.2, label=name)
    axis.plot(x, curves["all classes"], color="black", lw=2, label="all classes")
    if mark is not None:
        axis.axvline(mark, color="0.4", ls=":")
    axis.set(xlabel=label, ylabel="F1" if mark is not None else "precision", ylim=(0, 1.02))
    return True


def _draw_reliability(axis: Axes, evaluation: Evaluation) -> bool:
    found = evaluation.calibration[0]
    centres = (np.arange(BINS) + 0.5) / BINS
    axis.bar(centres, np.nan_to_num(found.precision), 0.9 / BINS, color=COLOURS[0], label="true")
    axis.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1, label="scores as probabilities")
    axis.plot(found.score, found.precision, "o", color="black", ms=4, label="mean score of a bin")
    axis.set(xlabel="score", ylabel="share of true detections", ylim=(0, 1.02), xlim=(0, 1))
    return True
