"""Rank collapse of trained or fresh models on images: tables, a chart and a record."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from miti_detr.data import read_image
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.engine.setup import setup_config
from miti_detr.files import replacing, write_text
from miti_detr.rank import measure_rank
from miti_detr.rank.collect import LayerMeasures
from miti_detr.visualize.curves import COLOURS

# Measure -> column of the table. The record has effective_rank_residual as well.
COLUMNS = {
    "residual": "r",
    "residual_fro": "r\nFrob",
    "cosine": "mean\ncos",
    "effective_rank": "eff.\nrank",
    "stable_rank": "st.\nrank",
    "std": "std",
    "entropy_self": "ent.\nself",
    "entropy_cross": "ent.\ncross",
    "norm_residual": "|res|",
    "norm_residual_change": "(14)\nright",
    "norm_published": "(14)\nleft",
}
CHARTS = {
    "residual": "relative residual r",
    "cosine": "mean pairwise cosine",
    "effective_rank": "effective rank",
    "entropy_self": "self-attention entropy / log n",
}
NOISE_IMAGES = 2


@dataclass(frozen=True)
class RankedModel:
    """One model's measures.

    Attributes:
        name: for tables and legend.
        source: config file and weights, as given.
        stacks: of :func:`miti_detr.rank.measure_rank`, over all images.
    """

    name: str
    source: dict[str, str]
    stacks: dict[str, LayerMeasures]


class LoadedModel(NamedTuple):
    """A model that is ready to be looked into.

    Attributes:
        name: for tables and legend.
        source: config file and weights, as given.
        cfg: what it was built from.
        predictor: has the model.
    """

    name: str
    source: dict[str, str]
    cfg: CfgNode
    predictor: Predictor


def load_models(
    config_files: Sequence[str],
    weights: Sequence[str],
    *,
    overrides: Sequence[str] = (),
    seed: int = 0,
) -> list[LoadedModel]:
    """Build models: trained ones from their weights, or fresh ones from their configs.

    Args:
        config_files: YAML files; with ``weights`` none, one for all of them, or one for each.
        weights: checkpoints; empty: every config is built with random weights.
        overrides: config keys and values for all models. ``MODEL.WEIGHTS`` among them gives fresh
            models the weights of a backbone.
        seed: of random weights, the same for each model.

    Raises:
        ValueError: neither is given, or their numbers do not fit.
    """
    if not config_files and not weights:
        raise ValueError("give --weights, or --config-file for random initialisation")
    if weights and len(config_files) not in (0, 1, len(weights)):
        raise ValueError(
            f"{len(config_files)} config files for {len(weights)} weights: give none, one, or one "
            "for each"
        )
    sources: list[dict[str, str]] = []
    cfgs: list[CfgNode] = []
    for index, file in enumerate(weights):
        config = config_files[min(index, len(config_files) - 1)] if config_files else None
        sources.append({"weights": file, **({"config_file": config} if config else {})})
        cfgs.append(load_config(config, weights=file, overrides=overrides))
    fresh = ("MODEL.WEIGHTS", "", "SOLVER.AMP.ENABLED", "False")
    for config in [] if weights else config_files:
        sources.append({"config_file": config, "weights": f"random, seed {seed}"})
        cfgs.append(setup_config(config, [*fresh, *overrides]))
    models = []
    for name, source, cfg in zip(model_names(weights or config_files), sources, cfgs, strict=True):
        torch.manual_seed(seed)
        models.append(LoadedModel(name, source, cfg, Predictor(cfg)))
    return models


def model_names(files: Sequence[str]) -> list[str]:
    """Name models by their files: as many last parts of the paths as it takes to tell them apart.

    A ``model_final`` is named by its folder.
    """
    parts = [[p for p in Path(f).with_suffix("").parts if p != "model_final"] for f in files]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} {index}" for index, name in enumerate(names, start=1)]


def rank_models(models: Sequence[LoadedModel], images: Sequence[Path]) -> list[RankedModel]:
    """Measure every model on every image, one image at a time.

    Args:
        models: of :func:`load_models`.
        images: image files; empty: two images of noise.
    """
    result = []
    for name, source, _, predictor in models:
        stacks: dict[str, LayerMeasures] = {}
        arrays = (
            [read_image(str(path), predictor.input_format) for path in images]
            if images
            else [_noise_image(index) for index in range(NOISE_IMAGES)]
        )
        for array in arrays:
            inputs = predictor.prepare(np.ascontiguousarray(array))
            _extend(stacks, measure_rank(predictor.model, [inputs]))
        result.append(RankedModel(name, source, stacks))
    return result


def comparison_table(models: Sequence[RankedModel]) -> str:
    """Relative residual r of each stack, layer by layer, one column a model: mean +- std."""
    rows = []
    for stack in _stack_names(models):
        depth = max(len(model.stacks.get(stack, [])) for model in models)
        for layer in range(depth):
            cells = [_cell(model.stacks.get(stack, []), layer, "residual") for model in models]
            rows.append([stack if layer == 0 else "", str(layer), *cells])
    headers = ["relative residual r", "layer", *(model.name for model in models)]
    return tabulate(
        rows, headers, colalign=("left", *("right",) * (len(headers) - 1)), disable_numparse=True
    )


def model_table(model: RankedModel) -> str:
    """All measures of one model, means of the images; one block of rows a stack."""
    present = {key for layers in model.stacks.values() for layer in layers for key in layer}
    keys = [key for key in COLUMNS if key in present]
    blocks = []
    for stack, layers in model.stacks.items():
        used = [key for key in keys if any(key in layer for layer in layers)]
        rows = [
            [str(index), *(_number(_mean(layer.get(key, []))) for key in used)]
            for index, layer in enumerate(layers)
        ]
        headers = ["layer", *(COLUMNS[key] for key in used)]
        table = tabulate(rows, headers, stralign="right", disable_numparse=True)
        blocks.append(f"{model.name}: {stack}\n{table}")
    return "\n\n".join(blocks)


def draw_chart(models: Sequence[RankedModel], path: Path) -> None:
    """Write one PNG: a column a stack, a row a measure, a line a model."""
    stacks = _stack_names(models)
    size = (3.3 * len(stacks) + 0.6, 2.1 * len(CHARTS) + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(CHARTS), len(stacks), squeeze=False)
    for row, (key, title) in zip(axes, CHARTS.items(), strict=True):
        for axis, stack in zip(row, stacks, strict=True):
            for index, model in enumerate(models):
                layers = model.stacks.get(stack, [])
                values = [_mean(layer.get(key, [])) for layer in layers]
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


def write_record(models: Sequence[RankedModel], images: Sequence[Path], path: Path) -> None:
    """Write every value as JSON; what is not defined is null."""
    record = {
        "images": [str(image) for image in images] or f"{NOISE_IMAGES} images of noise",
        "models": [
            {"name": model.name, **model.source, "stacks": plain(model.stacks)} for model in models
        ],
    }
    write_text(path, json.dumps(record, indent=1))


def _noise_image(index: int) -> np.ndarray:
    """Noise of 480 x 640 pixels, resized by the predictor as any image."""
    return np.random.default_rng(index).integers(0, 256, (480, 640, 3), dtype=np.uint8)


def _extend(stacks: dict[str, LayerMeasures], more: Mapping[str, LayerMeasures]) -> None:
    for name, layers in more.items():
        known = stacks.setdefault(name, [{} for _ in layers])
        for values, new in zip(known, layers, strict=True):
            for key, list_ in new.items():
                values.setdefault(key, []).extend(list_)


def _stack_names(models: Sequence[RankedModel]) -> list[str]:
    return list(dict.fromkeys(stack for model in models for stack in model.stacks))


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


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _cell(layers: LayerMeasures, layer: int, key: str) -> str:
    found = layers[layer].get(key, []) if layer < len(layers) else []
    values = [value for value in found if math.isfinite(value)]
    mean = _number(_mean(values))
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return mean if not math.isfinite(spread) else f"{mean} \u00b1 {spread:.2g}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def plain(value: Any) -> Any:
    """Values as JSON can hold them: null for what is not finite."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if math.isfinite(value) else None
