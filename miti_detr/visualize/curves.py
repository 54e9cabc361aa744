"""Learning curves of Detectron2 runs: loss, AP and AR over iterations (the paper's Figure 3)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from miti_detr.engine.hooks import read_records
from miti_detr.files import replacing

LOSS = re.compile(r"total_loss")
VALIDATION_LOSS = re.compile(r"(.+/)?validation/total_loss")
# With several test sets, Detectron2 prefixes a metric with the name of the data set.
AP = re.compile(r"(.+/)?bbox/AP")
AP50 = re.compile(r"(.+/)?bbox/AP50")
AR = re.compile(r"(.+/)?bbox/AR(@?100)?")
MASK_AP = re.compile(r"(.+/)?segm/AP")
MASK_AP50 = re.compile(r"(.+/)?segm/AP50")
PQ = re.compile(r"(.+/)?panoptic_seg/PQ")
_LARGEST = 2**53  # integers up to here are exact as floats
# Okabe and Ito's palette for colour-blind readers, readable on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Run:
    """The metrics of one run.

    Attributes:
        name: name in legends.
        records: iteration -> metric -> value, in order of iteration.
    """

    name: str
    records: dict[int, dict[str, float]]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the iterations that have ``key`` and its values there, both (P,)."""
        points = [(step, record[key]) for step, record in self.records.items() if key in record]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=int), np.array(values, dtype=float)

    def keys(self, pattern: re.Pattern[str]) -> list[str]:
        """Return the metrics whose whole name matches, sorted."""
        names = {key for record in self.records.values() for key in record}
        return sorted(key for key in names if pattern.fullmatch(key))


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Read a ``metrics.json`` of Detectron2, with one JSON record per line.

    A run that was stopped and resumed writes some iterations twice; the last value is used.
    Incomplete lines are skipped.

    Returns:
        iteration -> metric -> value, in order of iteration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no line is a record with an iteration, or the file is not text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: is this the output folder of a run?")
    try:
        records = read_records(str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a metrics.json of Detectron2: it is not text") from error
    metrics: dict[int, dict[str, float]] = {}
    for record in records:
        if isinstance(record, dict) and _is_iteration(record.get("iteration")):
            numbers = {key: float(value) for key, value in record.items() if _is_number(value)}
            metrics.setdefault(int(numbers.pop("iteration")), {}).update(numbers)
    if not metrics:
        raise ValueError(
            f"{path} holds no metrics. Either the run stopped before it wrote any, or the file is "
            "not a metrics.json of Detectron2"
        )
    return dict(sorted(metrics.items()))


def read_run(path: Path, name: str | None = None) -> Run:
    """Read a run from its output folder or its ``metrics.json``.

    Args:
        path: folder or file.
        name: name in legends; None uses the name of the folder.
    """
    file = path / "metrics.json" if path.is_dir() else path
    return Run(name or file.resolve().parent.name, read_metrics(file))


def run_names(paths: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as many parent folders as tell them apart."""
    parts = [(p.resolve() if p.is_dir() else p.resolve().parent).parts for p in paths]
    longest = max(map(len, parts))
    for depth in range(1, longest + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over a window of about a fifteenth of the points, shorter at both ends.

    Args:
        values: (P,) values; non-finite ones are ignored.

    Returns:
        (P,) average around each point; NaN if its window has no finite value.
    """
    half = len(values) // 30
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    first, last = index - reach, index + reach + 1
    number = count[last] - count[first]
    return np.where(number > 0, (total[last] - total[first]) / np.maximum(number, 1), np.nan)


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG with one panel each for loss, AP, AR, mask AP and panoptic quality.

    Panels of which no run has values are left out.

    Args:
        runs: runs to overlay, in one colour each.
        path: PNG file.

    Raises:
        ValueError: no run has any of them.
    """
    panels = [
        (draw, [run for run in runs if run.keys(pattern)])
        for draw, pattern in (
            (_draw_loss, LOSS),
            (_draw_ap, AP),
            (_draw_ar, AR),
            (_draw_mask_ap, MASK_AP),
            (_draw_pq, PQ),
        )
    ]
    panels = [(draw, present) for draw, present in panels if present]
    if not panels:
        raise ValueError(f"no total_loss, bbox/AP or bbox/AR in {', '.join(r.name for r in runs)}")
    colours = {id(run): COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    figure = Figure(figsize=(4.8 * len(panels), 3.9), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axis, (draw, present) in zip(axes, panels, strict=True):
        for run in present:
            draw(axis, run, colours[id(run)])
        _finish(axis)
    handles = [Line2D([], [], color=colours[id(run)], linewidth=2, label=run.name) for run in runs]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=min(len(runs), 4), frameon=False
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_loss(axis: Axes, run: Run, colour: str) -> None:
    if not axis.get_title():  # of the run before
        axis.set_title("training loss")
    for key in run.keys(LOSS):
        steps, values = run.series(key)
        axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        axis.plot(steps, smooth(values), color=colour, linewidth=1.8)
    for key in run.keys(VALIDATION_LOSS):
        axis.plot(
            *run.series(key), color=colour, linewidth=1.2, marker="o", markersize=3.5, ls="--"
        )
        axis.set_title("loss of training (solid) and validation (dashed)")


def _draw_ap(axis: Axes, run: Run, colour: str) -> None:
    _draw_metric(axis, run, colour, AP, AP50)
    axis.set_title("AP (solid) and AP50 (dashed), %")


def _draw_ar(axis: Axes, run: Run, colour: str) -> None:
    _draw_metric(axis, run, colour, AR)
    axis.set_title("AR (%)")


def _draw_mask_ap(axis: Axes, run: Run, colour: str) -> None:
    _draw_metric(axis, run, colour, MASK_AP, MASK_AP50)
    axis.set_title("mask AP (solid) and AP50 (dashed), %")


def _draw_pq(axis: Axes, run: Run, colour: str) -> None:
    _draw_metric(axis, run, colour, PQ)
    axis.set_title("panoptic quality (%)")


def _draw_metric(
    axis: Axes, run: Run, colour: str, solid: re.Pattern[str], dashed: re.Pattern[str] | None = None
) -> None:
    for key in run.keys(solid):
        axis.plot(*run.series(key), color=colour, linewidth=1.8, marker="o", markersize=3.5)
    for key in run.keys(dashed) if dashed else ():
        axis.plot(
            *run.series(key), color=colour, linewidth=1.2, marker="o", markersize=2.5, ls="--"
        )


def _finish(axis: Axes) -> None:
    axis.set_xlabel("iteration")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    highest = axis.dataLim.y1  # -inf where every value is NaN
    axis.set_ylim(0, 1.05 * highest if math.isfinite(highest) and highest > 0 else 1)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) <= _LARGEST


def _is_iteration(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST
