"""Runs what a benchmark asks for, one measurement after the other."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from miti_detr.files import write_text

from . import bench_chart, bench_report
from .bench import bench_steps
from .bench_child import in_child
from .bench_data import bench_evaluation, bench_loader
from .bench_grow import bench_growth
from .bench_limit import bench_limit
from .bench_model import count_model
from .bench_paper import paper_row
from .bench_spec import BenchSpec, shared_weights

TASKS = ("model", "inference", "training", "data", "evaluation")


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What a user asks for.

    Attributes:
        specs: one, or several with ``paper``.
        tasks: of :data:`TASKS`; None: all, against another side only those that it has.
        against: the other side.
        images: of the evaluation.
        grow: a variable of ``bench_grow``, instead of the tasks.
        limit: the limits, instead of the tasks.
        paper: the paper's table, instead of the tasks.
    """

    specs: tuple[BenchSpec, ...]
    tasks: tuple[str, ...] | None = None
    against: str | None = None
    images: int = 500
    grow: str | None = None
    limit: bool = False
    paper: bool = False


class Measurement(NamedTuple):
    """One finished measurement.

    Attributes:
        name: of the part of the record.
        result: for the record.
        text: for the reader.
    """

    name: str
    result: Any
    text: str


def run_benchmark(request: BenchRequest) -> Iterator[Measurement]:
    """Measure; yields each measurement when it is done.

    Raises:
        ValueError: for several configs or a task that do not fit.
        ImportError: if the other side is not installed.
    """
    if request.paper:
        rows = [in_child(spec.threads, paper_row, spec) for spec in request.specs]
        table = [dataclasses.asdict(row) for row in rows]
        yield Measurement("paper", table, bench_report.paper_table(rows))
        return
    if len(request.specs) != 1:
        raise ValueError(f"{len(request.specs)} config files; several are for --paper alone")
    spec = request.specs[0]
    if request.grow:
        points = bench_growth(
            spec,
            request.grow,
            plain=request.against == "plain",
            train="training" in (request.tasks or ()),
        )
        yield Measurement(
            "grow", {request.grow: points}, bench_report.growth_table(request.grow, points)
        )
    elif request.limit:
        with shared_weights(spec) as weights:
            result = in_child(spec.threads, bench_limit, spec, weights.path)
        yield Measurement("limit", result, bench_report.limit_table(result))
    else:
        yield from _run_tasks(spec, request)


def _run_tasks(spec: BenchSpec, request: BenchRequest) -> Iterator[Measurement]:
    tasks = request.tasks or (TASKS[:3] if request.against else TASKS)
    if "model" in tasks:
        sides = ["ours", "detr"] if request.against == "detr" else ["ours"]
        models = {side: in_child(spec.threads, count_model, spec, side) for side in sides}
        yield Measurement("model", models, bench_report.model_table(models))
    if {"inference", "training", "data"} & set(tasks):
        with shared_weights(spec, hf=request.against == "hf") as weights:
            for task in ("inference", "training"):
                if task in tasks:
                    steps = bench_steps(spec, task, weights, request.against)
                    text = bench_report.steps_table(task, steps, spec.batch)
                    yield Measurement(task, {**steps, "weights": weights.said}, text)
            if "data" in tasks:
                data = in_child(spec.threads, bench_loader, spec, weights.path)
                yield Measurement("data", data, bench_report.data_lines(data))
    if "evaluation" in tasks:
        found = in_child(spec.threads, bench_evaluation, request.images, spec.seed)
        yield Measurement("evaluation", found, bench_report.evaluation_lines(found))


def write_record(
    folder: Path, request: BenchRequest, machine: Mapping[str, Any], results: Mapping[str, Any]
) -> list[Path]:
    """Write ``bench.json``, and a chart of what can be drawn.

    Args:
        folder: is made.
        request: what was asked for.
        machine: of :func:`miti_detr.analysis.bench_child.machine`.
        results: name to result.

    Returns:
        The files.
    """
    path = folder / "bench.json"
    record = {"machine": machine, "request": dataclasses.asdict(request), "results": results}
    write_text(path, json.dumps(record, indent=1))
    files = [path]
    steps = {task: results[task] for task in ("inference", "training") if task in results}
    if steps:
        files.append(folder / "steps.png")
        bench_chart.draw_steps(steps, files[-1])
    for variable, points in results.get("grow", {}).items():
        files.append(folder / f"grow_{variable}.png")
        bench_chart.draw_growth(variable, points, files[-1])
    if "limit" in results:
        files.append(folder / "limit.png")
        bench_chart.draw_limit(results["limit"], files[-1])
    return files
