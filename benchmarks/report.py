"""Tables of benchmark results."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from miti_detr.bench.evaluation import Evaluation
from miti_detr.bench.steps import milliseconds

LABELS = {
    "ours": "this package",
    "detr": "without the residual",
    "plain": "plain path",
    "hf": "Hugging Face",
}
_TRAINING_PARTS = ("step", "forward", "criterion", "backward", "optimizer")
OURS_IS = "ours is"  # header of the column of ratios
# Table 2 of the paper, on COCO val2017 with four V100: model, seconds, parameters, AP
PUBLISHED = (
    ("DETR R50 (paper)", 484, 41_302_368, 37.7),
    ("UP-DETR R50 (paper)", 496, 41_302_880, 33.1),
    ("Miti-DETR R50 (paper)", 486, 41_302_368, 40.5),
)


def steps_table(task: str, result: Mapping[str, Any], batch: int) -> str:
    """Format the steps of one peer, or of two peers with their ratios.

    Args:
        task: ``inference`` or ``training``.
        result: result of :func:`bench_steps`.
        batch: number of images per step.
    """
    first, *parts = ("inference",) if task == "inference" else _TRAINING_PARTS
    seconds = result["seconds"].values()
    rows = [
        [f"{task}, ms", *_time_cells(result, first)],
        *([f"- {part}", *_time_cells(result, part)] for part in parts),
        ["images/s", *(f"{batch / statistics.median(peer[first]):.2f}" for peer in seconds)],
        *_memory_rows(result),
    ]
    headers = ["", *(LABELS[peer] for peer in result["seconds"])]
    if len(seconds) == 2:
        headers.append(OURS_IS)
        rows = [[*row, ""][: len(headers)] for row in rows]
    return "\n".join([_table(rows, headers), *_agreement_lines(result.get("agreement", {}))])


def _time_cells(result: Mapping[str, Any], part: str) -> list[str]:
    cells = [milliseconds(values[part]) for values in result["seconds"].values()]
    if "times_as_fast" in result:
        cells.append(_speed(result["times_as_fast"][part]))
    return cells


def _memory_rows(result: Mapping[str, Any]) -> list[list[str]]:
    memory = list(result["memory"].values())
    rows = {"peak MiB, process": "peak", "- added by steps": "added"}
    if any(peer["device_peak"] for peer in memory):
        rows = {"peak MiB, GPU": "device_peak"}
    ratios = result.get("times_the_memory", {})
    return [
        [name, *(f"{peer[key]:,.0f}" for peer in memory)]
        + ([f"{ratios[key]:.2f}x as large"] if key in ratios else [])
        for name, key in rows.items()
    ]


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Format a table with the first column aligned left and the others right."""
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(rows, headers, colalign=align, disable_numparse=True)


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
    """Format parameters and operations, one column per peer."""
    first = next(iter(models.values()))
    height, width = first["size"]
    rows = [
        ["parameters", *(f"{m['parameters']:,}" for m in models.values())],
        ["- trainable", *(f"{m['trainable']:,}" for m in models.values())],
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
    return _table(rows, ["", *(LABELS[peer] for peer in models)])


def loader_lines(result: Mapping[str, Any]) -> str:
    """Format the speed of the loader and of the training step that it feeds."""
    if "missing" in result:
        return f"training data are missing: {result['missing']}"
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
    """Format the time of the COCO metrics, compared with Detectron2's evaluator."""
    ours, stock = result["ours"], result["detectron2"]
    rows = [
        [name, f"{ours[key]:,.2f}", f"{stock[key]:,.2f}", f"{stock[key] / ours[key]:.1f}x as fast"]
        for name, key in (
            ("detections to results, s", "seconds"),
            ("- metrics only, s", "metrics"),
        )
    ]
    table = _table(rows, ["", LABELS["ours"], "Detectron2, pycocotools", OURS_IS])
    return (
        f"{table}\n{result['images']:,} images x 100 detections; largest difference of a statistic "
        f"{result['max_difference']:.1e}"
    )


def scaling_table(variable: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Format time and memory at each value, and their ratios between the last two.

    Args:
        variable: name of the variable.
        points: result of :func:`bench_scaling`.
    """
    plain = all("plain" in point for point in points)
    rows = []
    for point in points:
        row = [f"{point['value']:,}", *_scaling_cells(point["ours"])]
        if plain:
            row += [*_scaling_cells(point["plain"]), _speed(point["times_as_fast"])]
        rows.append(row)
    headers = [variable, "ms", "MiB added"] + (["plain: ms", "MiB added", OURS_IS] if plain else [])
    lines = [line for peer in ("ours", "plain") for line in _scaling_lines(points, peer)]
    return "\n".join([_table(rows, headers), *lines])


def _scaling_cells(peer: Mapping[str, Any]) -> list[str]:
    return [f"{1e3 * peer['seconds']:,.1f}", f"{added_memory(peer):,.0f}"]


def added_memory(peer: Mapping[str, Any]) -> float:
    """Return the memory in MiB that the steps of a peer added."""
    return peer["memory"]["device_peak"] or peer["memory"]["added"]


def _scaling_lines(points: Sequence[Mapping[str, Any]], peer: str) -> list[str]:
    found = [(p["value"], p[peer]) for p in points if peer in p and p["value"]][-2:]
    if len(found) < 2:
        return []
    (small, before), (large, after) = found
    memory = [added_memory(x) for x in (before, after)]
    return [
        f"{LABELS[peer]}, {small:,} to {large:,} ({large / small:.2f}x): time "
        f"{after['seconds'] / before['seconds']:.2f}x"
        + (f", memory {memory[1] / memory[0]:.2f}x" if memory[0] > 0 else "")
    ]


def roofline_table(result: Mapping[str, Any]) -> str:
    """Format the share of the rates of the machine that each part of a training step reaches."""
    total = sum(part["forward"] + part["backward"] for part in result["parts"].values())
    rows = [_roofline_row(name, part, total) for name, part in result["parts"].items()]
    rows.append(_roofline_row("whole step", _whole_step(result["parts"]), total))
    headers = ["part", "forward ms", "backward ms", "of step", "GFLOP", "GFLOP/s", "of limit"]
    rates = result["rates"]
    return (
        f"{_table(rows, headers)}\nlimit: matrix product {rates['product'] / 1e9:,.0f} GFLOP/s, as "
        f"1x1 convolution {rates['convolution'] / 1e9:,.0f}; optimizer: copy "
        f"{rates['copy'] / 1e9:,.1f} GB/s"
    )


def _roofline_row(name: str, part: Mapping[str, float], total: float) -> list[str]:
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
    """Sum the parts. The share is the time at the limit divided by the measured time."""
    whole = {
        key: sum(part[key] for part in parts.values()) for key in ("forward", "backward", "flops")
    }
    limit = sum(part["share"] * (part["forward"] + part["backward"]) for part in parts.values())
    return {**whole, "share": limit / (whole["forward"] + whole["backward"])}


def paper_table(rows: Sequence[Evaluation]) -> str:
    """Format Table 2 of the paper, with the published rows first."""
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
