"""Results of a benchmark as tables that fit a terminal."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from .bench_paper import PUBLISHED, PaperRow

LABELS = {
    "ours": "this package",
    "detr": "without the residual",
    "plain": "plain path",
    "hf": "Hugging Face",
}
_TRAINING_PARTS = ("step", "forward", "criterion", "backward", "optimizer")
_OPTIONS: dict[str, Any] = {"disable_numparse": True}


def steps_table(task: str, result: Mapping[str, Any], batch: int) -> str:
    """Table of ``inference`` or ``training``, with the other side if there is one, and the ratios.

    Args:
        task: see there.
        result: of :func:`miti_detr.analysis.bench.bench_steps`.
        batch: images per step.
    """
    first, *parts = ("inference",) if task == "inference" else _TRAINING_PARTS
    rows = [
        _time_row(result, f"{task}, ms", first),
        *(_time_row(result, f"- {part}", part) for part in parts),
        _images_row(result, first, batch),
        _memory_row(result),
    ]
    sides = list(result["seconds"])
    headers = ["", *(LABELS[side] for side in sides)] + (["ratio"] if len(sides) == 2 else [])
    table = tabulate(rows, headers, colalign=("left", *("right",) * (len(headers) - 1)), **_OPTIONS)
    return "\n".join([table, *_agreement_lines(result.get("agreement", {}))])


def _time_row(result: Mapping[str, Any], name: str, part: str) -> list[str]:
    cells = [_milliseconds(values[part]) for values in result["seconds"].values()]
    return [name, *cells, *([_ratio(result["ratio"][part])] if "ratio" in result else [])]


def _images_row(result: Mapping[str, Any], part: str, batch: int) -> list[str]:
    cells = [f"{batch / statistics.median(v[part]):.2f}" for v in result["seconds"].values()]
    return ["- images/s", *cells, *([""] if "ratio" in result else [])]


def _memory_row(result: Mapping[str, Any]) -> list[str]:
    on_gpu = any(memory["device_peak"] for memory in result["memory"].values())
    key = "device_peak" if on_gpu else "peak"
    peaks = [memory[key] for memory in result["memory"].values()]
    added = "" if on_gpu else "(over start)"
    cells = [
        f"{peak:,.0f} ({memory[key] - memory['start']:,.0f})" if added else f"{peak:,.0f}"
        for peak, memory in zip(peaks, result["memory"].values(), strict=True)
    ]
    ratio = [f"{peaks[1] / peaks[0]:.2f}"] if len(peaks) == 2 else []
    return [f"- peak MiB {added}".rstrip(), *cells, *ratio]


def _milliseconds(values: Sequence[float]) -> str:
    low, high = 1e3 * min(values), 1e3 * max(values)
    return f"{1e3 * statistics.median(values):,.1f} ({low:,.1f}..{high:,.1f})"


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f}..{ratio['max']:.2f})"


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
    headers = ["", *(LABELS[side] for side in models)]
    return tabulate(rows, headers, colalign=("left", *("right",) * len(models)), **_OPTIONS)


def data_lines(result: Mapping[str, Any]) -> str:
    """How fast the loader is, and the training step that it feeds."""
    if "missing" in result:
        return f"training data are not here: {result['missing']}"
    loader, step = (
        result["batch"] * len(result[key]) / sum(result[key])
        for key in ("loader_seconds", "step_seconds")
    )
    return (
        f"loader ({result['workers']} workers, batches of {result['batch']}): {loader:,.1f} "
        f"images/s; its training step takes {step:,.1f}: {loader / step:.2f}x"
    )


def evaluation_lines(result: Mapping[str, Any]) -> str:
    """COCO metrics against Detectron2's own evaluator."""
    ours, stock = result["ours"], result["detectron2"]
    rows = [
        [name, *(f"{side[key]:,.2f} s" for side in (ours, stock)), f"{stock[key] / ours[key]:.1f}x"]
        for name, key in (("detections to results", "seconds"), ("- metrics alone", "metrics"))
    ]
    title = f"evaluation of {result['images']:,} images x 100 detections"
    table = tabulate(rows, [title, "this package", "pycocotools", "ratio"], **_OPTIONS)
    return f"{table}\nlargest difference of a statistic {result['max_difference']:.1e}"


def growth_table(variable: str, points: Sequence[Mapping[str, Any]]) -> str:
    """Time and memory at each size."""
    plain = any("plain" in point for point in points)
    rows = []
    for point in points:
        row = [f"{point['value']:,}", *_growth_cells(point["ours"])]
        if plain:
            row += _growth_cells(point["plain"]) if "plain" in point else ["", "too large"]
            row.append(_ratio(point["ratio"]) if "ratio" in point else "")
        rows.append(row)
    headers = [variable, "ms", "MiB"] + (["plain: ms", "MiB", "time ratio"] if plain else [])
    return tabulate(rows, headers, colalign=("right",) * len(headers), **_OPTIONS)


def _growth_cells(side: Mapping[str, float]) -> list[str]:
    memory = side["device_memory"] or side["memory"]
    return [f"{1e3 * side['seconds']:,.1f}", f"{memory:,.0f}"]


def limit_table(result: Mapping[str, Any]) -> str:
    """Share of the machine's own rates that each part of a training step reaches."""
    total = sum(p["forward"] + p["backward"] for p in result["parts"].values())
    rows = []
    for name, part in result["parts"].items():
        seconds = part["forward"] + part["backward"]
        rate = part["flops"] / seconds / 1e9
        rows.append(
            [
                name,
                f"{1e3 * part['forward']:,.1f}",
                f"{1e3 * part['backward']:,.1f}" if part["backward"] else "",
                f"{seconds / total:.0%}",
                f"{part['flops'] / 1e9:,.1f}" if part["flops"] else "",
                f"{rate:,.1f}" if part["flops"] else "",
                f"{part['share']:.0%}",
            ]
        )
    headers = ["part", "forward ms", "backward ms", "of step", "GFLOP", "GFLOP/s", "of limit"]
    rates = result["rates"]
    return (
        tabulate(rows, headers, colalign=("left", *("right",) * 6), **_OPTIONS)
        + f"\nlimit: matrix product {rates['product'] / 1e9:,.0f} GFLOP/s, as 1x1 convolution "
        f"{rates['convolution'] / 1e9:,.0f}; optimizer: copy {rates['copy'] / 1e9:,.1f} GB/s"
    )


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
    table = tabulate(cells, headers, colalign=("left", *("right",) * 4), **_OPTIONS)
    return "\n".join([table, *(f"{row.name}: {row.note}" for row in rows if row.note)])
