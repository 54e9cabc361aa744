"""The models whose tokens are measured, and the record of the measurements."""

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

from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.engine.setup import setup_config
from miti_detr.files import write_text

from .collection import LayerMeasures, measure_rank

NOISE_IMAGES = 2


@dataclass(frozen=True)
class RankedModel:
    """The measures of one model.

    Attributes:
        name: name in tables and legends.
        source: config file and weights, as given.
        stacks: results of :func:`miti_detr.rank.measure_rank` for all images.
    """

    name: str
    source: dict[str, str]
    stacks: dict[str, LayerMeasures]


class LoadedModel(NamedTuple):
    """A model that is ready to be measured.

    Attributes:
        name: name in tables and legends.
        source: config file and weights, as given.
        cfg: config it was built from.
        predictor: predictor with the model.
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
    """Build trained models from weights, or untrained models from configs.

    Args:
        config_files: YAML files; with ``weights``, none, one for all, or one for each.
        weights: checkpoints; if empty, every config is built with random weights.
        overrides: config keys and values for all models. With ``MODEL.WEIGHTS``, untrained models
            get the weights of a backbone.
        seed: seed of random weights, the same for each model.

    Raises:
        ValueError: neither is given, or their numbers do not match.
    """
    if not config_files and not weights:
        raise ValueError("give --weights, or --config-file for random initialisation")
    if weights and len(config_files) not in (0, 1, len(weights)):
        raise ValueError(
            f"{len(config_files)} config files for {len(weights)} weights. Give none, one, or one "
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
    """Name models by the last parts of their paths, as many as tell them apart.

    A ``model_final`` is named after its folder.
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
        models: models from :func:`load_models`.
        images: image files; if empty, two images of noise are used.
    """
    result = []
    for name, source, _, predictor in models:
        stacks: dict[str, LayerMeasures] = {}
        arrays = (
            [predictor.read(path) for path in images]
            if images
            else [_noise_image(index) for index in range(NOISE_IMAGES)]
        )
        for array in arrays:
            inputs = predictor.prepare(np.ascontiguousarray(array))
            _extend(stacks, measure_rank(predictor.model, [inputs]))
        result.append(RankedModel(name, source, stacks))
    return result


def write_record(models: Sequence[RankedModel], images: Sequence[Path], path: Path) -> None:
    """Write every value as JSON; undefined values are null."""
    record = {
        "images": [str(image) for image in images] or f"{NOISE_IMAGES} images of noise",
        "models": [
            {"name": model.name, **model.source, "stacks": plain(model.stacks)} for model in models
        ],
    }
    write_text(path, json.dumps(record, indent=1))


def plain(value: Any) -> Any:
    """Replace non-finite numbers by None, so that JSON can hold the value."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value if math.isfinite(value) else None


def stack_names(models: Sequence[RankedModel]) -> list[str]:
    """Return the names of all stacks, each once."""
    return list(dict.fromkeys(stack for model in models for stack in model.stacks))


def mean(values: Sequence[float]) -> float:
    """Return the mean, or NaN without values."""
    return statistics.fmean(values) if values else math.nan


def _noise_image(index: int) -> np.ndarray:
    """Return noise of 480 x 640 pixels, which the predictor resizes like any image."""
    return np.random.default_rng(index).integers(0, 256, (480, 640, 3), dtype=np.uint8)


def _extend(stacks: dict[str, LayerMeasures], more: Mapping[str, LayerMeasures]) -> None:
    for name, layers in more.items():
        known = stacks.setdefault(name, [{} for _ in layers])
        for values, new in zip(known, layers, strict=True):
            for key, list_ in new.items():
                values.setdefault(key, []).extend(list_)
