"""Results of a benchmark as tables that fit a terminal."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from .paper import PUBLISHED, PaperRow

LABELS = {
    "ours": "this package",
    "detr": "without the residual",
    "plain": "plain path",
    "hf": "Hugging Face",
}
_TRAINING_PARTS = ("step", "forward", "criterion", "backward", "optimizer")
OURS_IS = "ours is"  # heads the column of ratios


def steps_table(task: str, result: Mapping[str, Any], batch: int) -> str:
    """Table of ``inference`` or ``training``, with the other side if there is one.

    Args:
        task: see there.
        result: of :func:`bench_steps`.
        batch: images per step.
    """
    first, *parts = ("inference",) if task == "inference" else _TRAINING_PARTS
    seconds = result["seconds"].values()
    rows = [
        [f"{task}, ms", *_time_cells(result, first)],
        *([f"- {part}", *_time_cells(result, part)] for part in parts),
        ["images/s", *(f"{batch / statistics.median(side[first]):.2f}" for side in seconds)],
        *_memory_rows(result),
    ]
    headers = ["", *(LABELS[side] for side in result["seconds"])]
    if len(seconds) == 2:
        headers.append(OURS_IS)
        rows = [[*row, ""][: len(headers)] for row in rows]
    return "\n".join([_table(rows, headers), *_agreement_lines(result.get("agreement", {}))])


def _time_cells(result: Mapping[str, Any], part: str) -> list[str]:
    cells = [_milliseconds(values[part]) for values in result["seconds"].values()]
    if "times_as_fast" in result:
        cells.append(_speed(result["times_as_fast"][part]))
    return cells


def _memory_rows(result: Mapping[str, Any]) -> list[list[str]]:
    memory = list(result["memory"].values())
    rows = {"peak MiB, process": "peak", "- added by steps": "added"}
    if any(side["device_peak"] for side in memory):
        rows = {"peak MiB, GPU": "device_peak"}
    ratios = result.get("times_the_memory", {})
    return [
        [name, *(f"{side[key]:,.0f}" for side in memory)]
        + ([f"{ratios[key]:.2f}x as large"] if key in ratios else [])
        for name, key in rows.items()
    ]


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """The first column to the left, numbers to the right."""
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(rows, headers, colalign=align, disable_numparse=True)


def _milliseconds(values: Sequence[float]) -> str:
    middle, *ends = (1e3 * x for x in (statistics.median(values), min(values), max(values)))
    digits = 1 if middle < 100 else 0
    low, high = (f"{x:,.{digits}f}" for x in ends)
    return f"{middle:,.{digits}f} ({low}..{high})"


def _speed(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f}x as fast ({ratio['min']:.2f}..{ratio['max']:.2f})"


def _agreement_lines(found: Mapping[str, Any]) -> list[str]:
    if "logits_max_difference" in found:
        return [
            f"largest difference of logits {found['logits_max_difference']:.1e}, of boxes "
            f"{found['boxes_max_difference']:.1e}"
        ]
    if "losses" in found:
        losses = ", ".join(f"{value:.5f}" for value in found["losses"][0])
        return [
            f"first losses {losses}: largest difference {found['losses_max_difference']:.1e} "
            f"(relative {found['losses_max_relative_difference']:.1e})"
        ]
    return []


def model_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Parameters and operations, one column a side."""
    first = next(iter(models.values()))
    height, width = first["size"]
    rows = [
        ["parameters", *(f"{m['parameters']:,}" for m in models.values())],
        ["- trained", *(f"{m['trainable']:,}" for m in models.values())],
        [
            f"GFLOPs (multiply-adds), {height} x {width}",
            *(f"{m['flops'] / 1e9:,.3f}" for m in models.values()),
        ],
        *(
            [f"- {part}", *(f"{m['flops_of'][part] / 1e9:,.3f}" for m in models.values())]
            for part in first["flops_of"]
        ),
        [
            "additions of tensors, millions",
            *(f"{m['additions'] / 1e6:,.3f}" for m in models.values()),
        ],
    ]
    return _table(rows, ["", *(LABELS[side] for side in models)])


def data_lines(result: Mapping[str, Any]) -> str:
    """How fast the loader is, and the training step that it feeds."""
    if "missing" in result:
        return f"training data are not here: {result['missing']}"
    loader, step = (
        result["batch"] * len(result[key]) / sum(result[key])
        for key in ("loader_seconds", "step_seconds")
    )
    return (
        f"loader: {loader:,.1f} images/s, {result['workers']} workers, batches of "
        f"{result['batch']}\ntraining step: {step:,.1f} images/s; the loader is "
        f"{loader / step:.2f}x as fast"
    )


def evaluation_table(result: Mapping[str, Any]) -> str:
    """COCO metrics against Detectron2's own evaluator."""
    ours, stock = result["ours"], result["detectron2"]
    rows = [
        [name, f"{ours[key]:,.2f}", f"{stock[key]:,.2f}", f"{stock[key] / ours[key]:.1f}x as fast"]
        for name, key in (
            ("detections to results, s", "seconds"),
            ("- metrics alone, s", "metrics"),
        )
    ]
    table = _table(rows, ["", LABELS["ours"], "Detectron2, pycocotools", OURS_IS])
    return (
        f"{table}\n{result['images']:,} images x 100 detections; largest difference of a statistic "
        f"{result['max_difference']:.1e}"
    )


def growth_table(variable: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory at each size, and how they grow between the last two.

    Args:
        variable: its name.
        points: of :func:`bench_growth`.
    """
    plain = any("plain" in point for point in points)
    rows = []
    for point in points:
        row = [f"{point['value']:,}", *_growth_cells(point["ours"])]
        if plain:
            row += _growth_cells(point["plain"]) if "plain" in point else ["too large", ""]
            row.append(_speed(point["times_as_fast"]) if "plain" in point else "")
        rows.append(row)
    headers = [variable, "ms", "MiB added"] + (["plain: ms", "MiB added", OURS_IS] if plain else [])
    lines = [line for side in ("ours", "plain") for line in _growth_lines(points, side)]
    return "\n".join([_table(rows, headers), *lines])


def _growth_cells(side: Mapping[str, Any]) -> list[str]:
    return [f"{1e3 * side['seconds']:,.1f}", f"{added_memory(side):,.0f}"]


def added_memory(side: Mapping[str, Any]) -> float:
    """MiB that the steps of a side of a growth point took."""
    return side["memory"]["device_peak"] or side["memory"]["added"]


def _growth_lines(points: Sequence[Mapping[str, Any]], side: str) -> list[str]:
    found = [(p["value"], p[side]) for p in points if side in p and p["value"]][-2:]
    if len(found) < 2:
        return []
    (small, before), (large, after) = found
    memory = [added_memory(x) for x in (before, after)]
    return [
        f"{LABELS[side]}, {small:,} to {large:,} ({large / small:.2f}x): time "
        f"{after['seconds'] / before['seconds']:.2f}x"
        + (f", memory {memory[1] / memory[0]:.2f}x" if memory[0] > 0 else "")
    ]


def limit_table(result: Mapping[str, Any]) -> str:
    """Share of the machine's own rates that each part of a training step reaches."""
    total = sum(part["forward"] + part["backward"] for part in result["parts"].values())
    rows = [_limit_row(name, part, total) for name, part in result["parts"].items()]
    rows.append(_limit_row("whole step", _whole_step(result["parts"]), total))
    headers = ["part", "forward ms", "backward ms", "of step", "GFLOP", "GFLOP/s", "of limit"]
    rates = result["rates"]
    return (
        f"{_table(rows, headers)}\nlimit: matrix product {rates['product'] / 1e9:,.0f} GFLOP/s, as "
        f"1x1 convolution {rates['convolution'] / 1e9:,.0f}; optimizer: copy "
        f"{rates['copy'] / 1e9:,.1f} GB/s"
    )


def _limit_row(name: str, part: Mapping[str, float], total: float) -> list[str]:
    seconds = part["forward"] + part["backward"]
    return [
        name,
        f"{1e3 * part['forward']:,.1f}",
        f"{1e3 * part['backward']:,.1f}" if part["backward"] else "",
        f"{seconds / total:.0%}",
        f"{part['flops'] / 1e9:,.1f}" if part["flops"] else "",
        f"{part['flops'] / seconds / 1e9:,.1f}" if part["flops"] else "",
        f"{part['share']:.0%}",
    ]


def _whole_step(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """All parts together; the share is the time at the limit over the time taken."""
    whole = {
        key: sum(part[key] for part in parts.values()) for key in ("forward", "backward", "flops")
    }
    limit = sum(part["share"] * (part["forward"] + part["backward"]) for part in parts.values())
    return {**whole, "share": limit / (whole["forward"] + whole["backward"])}


def paper_table(rows: Sequence[PaperRow]) -> str:
    """The paper's Table 2, its own rows first."""
    cells = [
        [name, f"{s:,}", "5,000", f"{count:,}", f"{ap:.1f}"] for name, s, count, ap in PUBLISHED
    ]
    for row in rows:
        seconds = "" if row.seconds is None else f"{row.seconds:,.1f}"
        ap = "" if row.ap is None else f"{row.ap:.1f}"
        images = f"{row.images:,}" if row.images else ""
        cells.append([row.name, seconds, images, f"{row.parameters:,}", ap])
    headers = ["model", "evaluation s", "images", "#params", "AP"]
    return "\n".join(
        [_table(cells, headers), *(f"{row.name}: {row.note}" for row in rows if row.note)]
    )
