"""Charts of benchmark results."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from miti_detr.files import replacing
from miti_detr.visualize.curves import COLOURS

from .report import LABELS, added_memory

_STACK = ("forward", "criterion", "backward", "optimizer")


def draw_steps(task: str, result: Mapping[str, Any], path: Path) -> None:
    """Draw time and peak memory of inference or training, one bar per peer.

    Args:
        task: ``inference`` or ``training``.
        result: result of :func:`bench_steps`.
        path: PNG file.
    """
    figure = Figure(figsize=(9, 2.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    peers = list(result["seconds"])
    _stacked_bars(left, result["seconds"], ("inference",) if task == "inference" else _STACK)
    left.set(title=f"{task}: ms per step", yticks=range(len(peers)))
    left.set_yticklabels([LABELS[peer] for peer in peers])
    peaks = [m["device_peak"] or m["peak"] for m in result["memory"].values()]
    bars = right.barh(range(len(peers)), peaks, color=[COLOURS[i] for i in range(len(peers))])
    right.bar_label(bars, [f"{peak:,.0f}" for peak in peaks], padding=3)
    right.set(title=f"{task}: peak MiB", yticks=[], xlim=(0, 1.2 * max(peaks)))
    for axis in (left, right):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _stacked_bars(
    axis: Axes, seconds: Mapping[str, Mapping[str, list[float]]], parts: Sequence[str]
) -> None:
    totals = []
    for row, values in enumerate(seconds.values()):
        left = 0.0
        for index, part in enumerate(parts):
            width = 1e3 * statistics.median(values[part])
            colour = COLOURS[row] if len(parts) == 1 else COLOURS[index]
            label = part if row == 0 and len(parts) > 1 else None
            axis.barh(row, width, left=left, color=colour, label=label)
            left += width
        totals.append(left)
        axis.text(left, row, f" {left:,.0f}", va="center")
    axis.set_xlim(0, 1.2 * max(totals))
    if len(parts) > 1:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(parts), frameon=False)


def draw_scaling(variable: str, points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw time and added memory against a variable, on logarithmic axes.

    Args:
        variable: name of the variable.
        points: result of :func:`bench_scaling`.
        path: PNG file.
    """
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, peer in zip(COLOURS, ("ours", "plain"), strict=False):
        found = [point for point in points if peer in point]
        if not found:
            continue
        values = [point["value"] for point in found]
        seconds = [1e3 * point[peer]["seconds"] for point in found]
        memory = [added_memory(point[peer]) for point in found]
        left.plot(values, seconds, "o-", color=colour, label=LABELS[peer])
        right.plot(values, memory, "o-", color=colour, label=LABELS[peer])
    left.set(title="ms per step", yscale="log")
    right.set(title="memory added by steps, MiB", yscale="symlog")  # memory may be 0
    for axis in (left, right):
        axis.set(xlabel=variable, xscale="log" if points[0]["value"] else "symlog")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    _save(figure, path)


def draw_roofline(result: Mapping[str, Any], path: Path) -> None:
    """Draw the time of each part of a training step, and the share of the limit it reaches.

    Args:
        result: result of :func:`bench_roofline`.
        path: PNG file.
    """
    figure = Figure(figsize=(9, 3), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(result["parts"])
    parts = result["parts"].values()
    forward = [1e3 * part["forward"] for part in parts]
    backward = [1e3 * part["backward"] for part in parts]
    left.barh(names, forward, color=COLOURS[0], label="forward")
    left.barh(names, backward, left=forward, color=COLOURS[1], label="backward")
    left.set(title="ms per training step")
    left.legend(frameon=False)
    shares = [100 * part["share"] for part in parts]
    bars = right.barh(names, shares, color=COLOURS[2])
    right.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=3)
    right.set(title="share of the machine's rate, %", yticks=[], xlim=(0, 1.2 * max(shares)))
    for axis in (left, right):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
