"""The tables of the rank measures, as text."""

import math
import statistics
from collections.abc import Sequence

from tabulate import tabulate

from .collection import LayerMeasures
from .models import RankedModel, mean, stack_names

# Measure -> column of the table. The record also has effective_rank_residual.
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


def comparison_table(models: Sequence[RankedModel]) -> str:
    """Tabulate the relative residual r of each layer, a column per model: mean and deviation."""
    rows = []
    for stack in stack_names(models):
        depth = max(len(model.stacks.get(stack, [])) for model in models)
        for layer in range(depth):
            cells = [_cell(model.stacks.get(stack, []), layer, "residual") for model in models]
            rows.append([stack if layer == 0 else "", str(layer), *cells])
    headers = ["relative residual r", "layer", *(model.name for model in models)]
    return tabulate(
        rows, headers, colalign=("left", *("right",) * (len(headers) - 1)), disable_numparse=True
    )


def model_table(model: RankedModel) -> str:
    """Tabulate all measures of one model, averaged over the images, a block of rows per stack."""
    present = {key for layers in model.stacks.values() for layer in layers for key in layer}
    keys = [key for key in COLUMNS if key in present]
    blocks = []
    for stack, layers in model.stacks.items():
        used = [key for key in keys if any(key in layer for layer in layers)]
        rows = [
            [str(index), *(_number(mean(layer.get(key, []))) for key in used)]
            for index, layer in enumerate(layers)
        ]
        headers = ["layer", *(COLUMNS[key] for key in used)]
        table = tabulate(rows, headers, stralign="right", disable_numparse=True)
        blocks.append(f"{model.name}: {stack}\n{table}")
    return "\n\n".join(blocks)


def _cell(layers: LayerMeasures, layer: int, key: str) -> str:
    found = layers[layer].get(key, []) if layer < len(layers) else []
    values = [value for value in found if math.isfinite(value)]
    text = _number(mean(values))
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return text if not math.isfinite(spread) else f"{text} \u00b1 {spread:.2g}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
