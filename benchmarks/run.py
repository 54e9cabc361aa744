"""Runs what a benchmark asks for, one measurement after the other."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from miti_detr.files import write_text

from . import TASKS, chart, report
from .data import bench_evaluation, bench_loader
from .model import count_model
from .paper import paper_row
from .roofline import bench_limit
from .scaling import bench_growth
from .spec import BenchSpec, bench_config, shared_weights
from .steps import bench_steps
from .worker import in_child


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What a user asks for.

    Attributes:
        specs: one, or several with ``paper``.
        tasks: of ``TASKS``; None: all, against another side only those that it has.
        against: the other side, of ``SIDES``.
        images: of the evaluation.
        grow: of ``VARIABLES``: how cost grows with it, instead of the tasks. With the task
            ``training`` forward and backward, otherwise forward alone.
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
    """Check what is asked for, then measure.

    Returns:
        Gives each measurement when it is done.

    Raises:
        ValueError: for what does not fit together, or configs that the other side cannot have.
        ImportError: if the other side is not installed.
    """
    if request.grow and request.against not in (None, "plain"):
        raise ValueError(f"--grow measures against plain alone, not {request.against}")
    if request.against and (request.limit or request.paper):
        raise ValueError("--limit and --paper measure nothing against another side: no --against")
    if len(request.specs) != 1 and not request.paper:
        raise ValueError(f"{len(request.specs)} config files; several are for --paper alone")
    for spec in request.specs:
        bench_config(spec, request.against or "ours")
    return _measure(request)


def _measure(request: BenchRequest) -> Iterator[Measurement]:
    spec = request.specs[0]
    if request.paper:
        rows = [in_child(spec.threads, paper_row, spec) for spec in request.specs]
        table = [dataclasses.asdict(row) for row in rows]
        yield Measurement("paper", table, report.paper_table(rows))
    elif request.grow:
        plain, train = request.against == "plain", "training" in (request.tasks or ())
        points = bench_growth(spec, request.grow, plain=plain, train=train)
        text = report.growth_table(request.grow, points)
        yield Measurement("grow", {request.grow: points}, text)
    elif request.limit:
        with shared_weights(spec) as weights:
            result = in_child(spec.threads, bench_limit, spec, weights.path)
        yield Measurement("limit", result, report.limit_table(result))
    else:
        yield from _run_tasks(spec, request)


def _run_tasks(spec: BenchSpec, request: BenchRequest) -> Iterator[Measurement]:
    tasks = request.tasks or (TASKS[:3] if request.against else TASKS)
    if "model" in tasks:
        sides = ["ours", "detr"] if request.against == "detr" else ["ours"]
        models = {side: in_child(spec.threads, count_model, spec, side) for side in sides}
        yield Measurement("model", models, report.model_table(models))
    if {"inference", "training", "data"} & set(tasks):
        with shared_weights(spec, hf=request.against == "hf") as weights:
            for task in ("inference", "training"):
                if task in tasks:
                    steps = bench_steps(spec, task, weights, request.against)
                    text = report.steps_table(task, steps, spec.batch)
                    yield Measurement(task, {**steps, "weights": weights.said}, text)
            if "data" in tasks:
                data = in_child(spec.threads, bench_loader, spec, weights.path)
                yield Measurement("data", data, report.data_lines(data))
    if "evaluation" in tasks:
        found = in_child(spec.threads, bench_evaluation, request.images, spec.seed)
        yield Measurement("evaluation", found, report.evaluation_table(found))


def write_record(
    folder: Path, request: BenchRequest, machine: Mapping[str, Any], results: Mapping[str, Any]
) -> list[Path]:
    """Write a chart of what can be drawn, and at last ``bench.json``.

    Args:
        folder: is made.
        request: what was asked for.
        machine: of :func:`describe_machine`.
        results: name to result.

    Returns:
        The files.
    """
    files = []
    steps = {task: results[task] for task in ("inference", "training") if task in results}
    if steps:
        files.append(folder / "steps.png")
        chart.draw_steps(steps, files[-1])
    for variable, points in results.get("grow", {}).items():
        files.append(folder / f"grow_{variable}.png")
        chart.draw_growth(variable, points, files[-1])
    if "limit" in results:
        files.append(folder / "limit.png")
        chart.draw_limit(results["limit"], files[-1])
    files.append(folder / "bench.json")
    record = {"machine": machine, "request": dataclasses.asdict(request), "results": results}
    write_text(files[-1], json.dumps(record, indent=1))
    return files
