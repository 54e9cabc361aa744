"""The figures of a comparison: one PNG per panel, so that each fits the screen of a phone."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from miti_detr.report.page import Figure
from miti_detr.report.panels import draw_panel
from miti_detr.study.comparison import ArmResult, Comparison
from miti_detr.study.results import RunResult
from miti_detr.study.series import has_epochs, last_layer, match_changes, rank_keys, step_series
from miti_detr.study.statistics import mean_and_spread, paired_difference
from miti_detr.visualize.curves import COLOURS, smooth

from .trends import trend_panels

Curve = tuple[np.ndarray, np.ndarray]
Styles = dict[str, dict[str, Any]]
Draw = Callable[[Axes, Styles], bool]
_LINES = ("-", "--", ":")
RANK_MEASURES = ("residual", "cosine", "effective_rank")


def draw_figures(
    arms: Sequence[ArmResult], comparison: Comparison, folder: Path, styles: Styles
) -> list[Figure]:
    """Draw the panels of a group of arms.

    Args:
        arms: arms of the group.
        comparison: whole comparison, which has the reference arms.
        folder: folder for the PNGs.
        styles: styles from :func:`arm_styles`.

    Returns:
        The panels for which the runs have numbers.
    """
    drawn = []
    for key, caption, draw in _panels(arms, comparison):
        path = folder / f"{key}.png"
        if draw_panel(path, partial(_draw, draw, styles), legend=key != "final"):
            drawn.append(Figure(path, caption))
    return drawn


def arm_styles(comparison: Comparison) -> Styles:
    """Choose the colour and line of each arm for all figures; lines are dashed after seven arms."""
    return {
        arm.name: {"color": COLOURS[i % len(COLOURS)], "linestyle": _LINES[i // len(COLOURS) % 3]}
        for i, arm in enumerate(comparison.arms)
    }


def _draw(draw: Draw, styles: Styles, axis: Axes) -> bool:
    return draw(axis, styles)


def _panels(arms: Sequence[ArmResult], comparison: Comparison) -> list[tuple[str, str, Draw]]:
    """Return the name, caption and drawing function of each panel."""

    def curves(read: Callable[[RunResult], Curve], label: str, *, in_layers: bool = False) -> Draw:
        """Return a function that draws a curve per arm, over iterations or over layers."""

        def scale(axis: Axes, x: np.ndarray) -> np.ndarray:
            return _scale_layers(axis, x) if in_layers else _scale_steps(axis, x, arms)

        return lambda axis, styles: _draw_curves(axis, arms, read, label, styles, scale)

    def error(run: RunResult) -> Curve:
        """Return 1 - AP."""
        steps, values = run.curve("AP")
        return steps, 1 - values / 100

    panels: list[tuple[str, str, Draw]] = [
        (
            "loss",
            "Figure 3, left: training loss (weighted sum, smoothed). Here and below, the line is "
            "the mean over the seeds and the band is \u00b1 1 standard deviation.",
            curves(lambda run: _smoothed(run, "total_loss"), "training loss"),
        ),
        ("error", "Figure 3, middle: test error, 1 \u2212 AP (not AP50).", curves(error, "1 - AP")),
        ("recall", "Figure 3, right: AR@100 in percent.", curves(lambda r: r.curve("AR"), "AR")),
        (
            "difference",
            "AP minus the AP of the reference, paired by seed; the band is the 95 % interval.",
            lambda axis, styles: _draw_differences(axis, arms, comparison, styles),
        ),
        (
            "final",
            "AP of the last evaluation: one point per run, and their mean as a line.",
            lambda axis, styles: _draw_final(axis, arms, styles),
        ),
        (
            "gradient",
            "Gradient norm before clipping, smoothed.",
            curves(lambda run: _smoothed(run, "grad_norm"), "gradient norm"),
        ),
        (
            "matching",
            "Objects whose query changed since the previous evaluation, last decoder layer.",
            curves(_last_layer_changes, "changed matches (%)"),
        ),
    ]
    for (stack, measure), keys in rank_keys(arms).items():
        if measure not in RANK_MEASURES:
            continue
        label = measure.replace("_", " ")
        layers = curves(partial(_by_layer, keys=keys), label, in_layers=True)
        name = f"rank_{stack.replace(', ', '_')}_{measure}"
        panels.append(
            (name, f"Rank after training: {label} after each layer of the {stack}.", layers)
        )
        last = curves(partial(_after_last_layer, keys=keys), label)
        caption = f"Rank during training: {label} after the last layer of the {stack}."
        panels.append((f"{name}_training", caption, last))
    return [*trend_panels(arms), *panels]


def _by_layer(run: RunResult, keys: Sequence[str]) -> Curve:
    values = np.array([run.final(key) for key in keys])
    present = np.isfinite(values)
    layers = np.array([int(key.split("/layer")[1].split("/")[0]) for key in keys])
    return layers[present], values[present]


def _after_last_layer(run: RunResult, keys: Sequence[str]) -> Curve:
    return run.curve(last_layer(run, keys))


def _smoothed(run: RunResult, key: str) -> Curve:
    steps, values = step_series(run, key)
    return steps, smooth(values)


def _last_layer_changes(run: RunResult) -> Curve:
    steps, shares = match_changes(run)
    return steps, 100 * shares[:, -1] if len(shares) else shares


def common_curve(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Stack the curves of several runs at the steps where all of them have points.

    Args:
        curves: S curves, each with steps (P_s,) and values (P_s,).

    Returns:
        Steps (P,), values (S, P).
    """
    steps = curves[0][0]
    for other, _ in curves[1:]:
        steps = np.intersect1d(steps, other)
    return steps, np.array([v[np.isin(s, steps)] for s, v in curves])


def _draw_curves(
    axis: Axes,
    arms: Sequence[ArmResult],
    read: Callable[[RunResult], Curve],
    label: str,
    styles: Styles,
    scale: Callable[[Axes, np.ndarray], np.ndarray],
) -> bool:
    drawn = False
    for arm in arms:
        curves = [curve for run in arm.runs if len((curve := read(run))[0])]
        if not curves:
            continue
        steps, values = common_curve(curves)
        x = scale(axis, steps)
        mean = values.mean(axis=0)
        marker = "o" if len(x) <= 40 else ""
        axis.plot(x, mean, **styles[arm.name], label=arm.name, marker=marker, ms=3.5, lw=1.6)
        if len(values) > 1:
            spread = values.std(axis=0, ddof=1)
            axis.fill_between(
                x, mean - spread, mean + spread, color=styles[arm.name]["color"], alpha=0.15, lw=0
            )
        drawn |= bool(len(x))
    axis.set_ylabel(label)
    return drawn


def _draw_differences(
    axis: Axes, arms: Sequence[ArmResult], comparison: Comparison, styles: Styles
) -> bool:
    by_name = {arm.name: arm for arm in comparison.arms}
    drawn = False
    for arm in arms:
        pairs = arm.pairs(by_name[arm.reference]) if arm.reference in by_name else []
        curves = [run.curve("AP") for pair in pairs for run in pair]
        if not curves or not all(len(steps) for steps, _ in curves):
            continue
        steps, values = common_curve(curves)
        found = [paired_difference(v[0::2], v[1::2]) for v in values.T]
        kept = [(step, cell) for step, cell in zip(steps, found, strict=True) if cell is not None]
        if not kept:
            continue
        x = _scale_steps(axis, np.array([step for step, _ in kept]), arms)
        means = [cell["mean"] for _, cell in kept]
        axis.plot(x, means, **styles[arm.name], label=arm.name, marker="o", ms=3.5, lw=1.6)
        if kept[0][1]["low"] is not None:
            low = [cell["low"] for _, cell in kept]
            high = [cell["high"] for _, cell in kept]
            axis.fill_between(x, low, high, color=styles[arm.name]["color"], alpha=0.12, lw=0)
        drawn = True
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set_ylabel("difference of AP")
    return drawn


def _draw_final(axis: Axes, arms: Sequence[ArmResult], styles: Styles) -> bool:
    drawn = False
    for index, arm in enumerate(arms):
        values = [value for value in arm.values("AP") if math.isfinite(value)]
        mean = mean_and_spread(values)
        if mean is None:
            continue
        axis.plot(
            [index] * len(values), values, "o", color=styles[arm.name]["color"], ms=4.5, alpha=0.7
        )
        axis.hlines(mean["mean"], index - 0.3, index + 0.3, color=styles[arm.name]["color"], lw=2)
        drawn = True
    names = [arm.name for arm in arms]
    axis.set_xticks(range(len(arms)), names, rotation=25, ha="right", fontsize=8)
    axis.set_ylabel("AP")
    return drawn


def _scale_layers(axis: Axes, layers: np.ndarray) -> np.ndarray:
    axis.set_xlabel("layer (0: the input)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return layers


def _scale_steps(axis: Axes, steps: np.ndarray, arms: Sequence[ArmResult]) -> np.ndarray:
    """Return iterations, or epochs if all runs know their length, and label the axis."""
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7))
    if not has_epochs(arms):
        axis.set_xlabel("iteration")
        return steps
    axis.set_xlabel("epoch")
    return steps / arms[0].runs[0].facts["iterations_per_epoch"]
