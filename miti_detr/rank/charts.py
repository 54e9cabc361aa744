"""The chart of the rank measures, layer by layer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from miti_detr.files import replacing
from miti_detr.visualize.curves import COLOURS

from .models import RankedModel, mean, stack_names

CHARTS = {
    "residual": "relative residual r",
    "cosine": "mean pairwise cosine",
    "effective_rank": "effective rank",
    "entropy_self": "self-attention entropy / log n",
}


def draw_chart(models: Sequence[RankedModel], path: Path) -> None:
    """Write a PNG with a column per stack, a row per measure, and a line per model."""
    stacks = stack_names(models)
    size = (3.3 * len(stacks) + 0.6, 2.1 * len(CHARTS) + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(CHARTS), len(stacks), squeeze=False)
    for row, (key, title) in zip(axes, CHARTS.items(), strict=True):
        for axis, stack in zip(row, stacks, strict=True):
            for index, model in enumerate(models):
                layers = model.stacks.get(stack, [])
                values = [mean(layer.get(key, [])) for layer in layers]
                axis.plot(values, color=COLOURS[index % len(COLOURS)], marker="o", markersize=3)
            _finish(axis, key)
        row[0].set_ylabel(title, fontsize=8)
    for axis, stack in zip(axes[0], stacks, strict=True):
        axis.set_title(stack, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("layer (0: input)")
    handles = list(axes[0][0].lines)
    names = [model.name for model in models]
    figure.legend(handles, names, loc="outside upper center", ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _finish(axis: Axes, key: str) -> None:
    drawn = np.concatenate([line.get_ydata() for line in axis.lines])
    values = drawn[np.isfinite(drawn)]
    if not len(values):
        axis.set_visible(False)
        return
    if key == "residual" and values.min() < 0.03 * values.max():
        axis.set_yscale("log")
    elif key == "effective_rank":
        axis.set_ylim(0, 1.05 * values.max())
    else:
        axis.set_ylim(-0.05, 1.05 * max(1, values.max()))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(color="0.9")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
