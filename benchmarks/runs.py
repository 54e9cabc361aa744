"""The list of benchmark runs: reads it, measures a run, and writes its record."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from miti_detr.bench.evaluation import time_evaluation
from miti_detr.bench.inputs import PRECISIONS
from miti_detr.files import write_text

from . import PEERS, VARIABLES, chart, report
from .data import bench_evaluation, bench_loader
from .model import count_model
from .roofline import bench_roofline
from .scaling import bench_scaling
from .spec import BenchSpec, bench_config, shared_weights
from .steps import bench_steps
from .worker import in_worker

ROOT = Path(__file__).parents[1]
RECORD = "result.json"  # written last, so that a run with this file is complete
KINDS = ("model", "inference", "training", "loader", "evaluation", "scaling", "roofline", "paper")
_SPEC_KEYS = ("batch", "precision", "objects", "repeats", "seed")
_CHOICES = {"kind": KINDS, "against": PEERS[1:], "variable": VARIABLES, "precision": PRECISIONS}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the list.

    Attributes:
        name: name of the run and of its folder.
        kind: what is measured, one of ``KINDS``. ``model``: parameters and operations.
            ``inference``, ``training``: steps, in turn with those of another peer. ``loader``: the
            training loader. ``evaluation``: COCO metrics. ``scaling``: cost as a function of a
            variable. ``roofline``: parts of a training step and the limits of the machine.
            ``paper``: a row of Table 2 of the paper.
        spec: config, images and repetitions.
        against: the other peer.
        variable: variable of ``scaling``.
        images: number of images of ``evaluation``.
    """

    name: str
    kind: str
    spec: BenchSpec
    against: str | None = None
    variable: str = "tokens"
    images: int = 5000


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The result of a run: data for its record, and a table for the reader."""

    result: Any
    text: str


def read_runs(path: Path, *, threads: int) -> list[Run]:
    """Read a list of runs.

    Args:
        path: YAML file that maps the name of each run to its ``kind``, its ``config`` (relative to
            the repository) and further attributes of :class:`Run` and :class:`BenchSpec`.
        threads: number of torch threads of each run.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a run has an unknown key or value.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is not a mapping. Map the name of each run to its attributes")
    return [_read_run(path, str(name), entry, threads) for name, entry in entries.items()]


def _read_run(path: Path, name: str, entry: Any, threads: int) -> Run:
    known = {"kind", "config", "overrides", "sizes", "against", "variable", "images", *_SPEC_KEYS}
    where = f"{path}, run {name}"
    if not isinstance(entry, dict) or not {"kind", "config"} <= entry.keys():
        raise ValueError(f"{where}: kind or config is missing. Add both")
    for key, value in entry.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key {key}. Use {', '.join(sorted(known))}")
        if value not in _CHOICES.get(key, (value,)):
            raise ValueError(f"{where}: {key} is {value!r}. Use one of {', '.join(_CHOICES[key])}")
    overrides: list[str] = []
    for key, value in entry.get("overrides", {}).items():
        overrides += [key, str(value)]
    spec = {key: entry[key] for key in _SPEC_KEYS if key in entry}
    if "sizes" in entry:
        spec["sizes"] = tuple(tuple(size) for size in entry["sizes"])
    config = str(ROOT / entry["config"])
    rest = {key: entry[key] for key in ("against", "variable", "images") if key in entry}
    bench_spec = BenchSpec(config, tuple(overrides), threads=threads, **spec)
    return Run(name, entry["kind"], bench_spec, **rest)


def measure(run: Run) -> Measurement:
    """Measure a run.

    Raises:
        ValueError: the config does not fit the run.
        ImportError: an optional package is missing.
    """
    bench_config(run.spec, run.against or "ours")  # raises before anything is measured
    return _MEASURES[run.kind](run)


def write_run(folder: Path, run: Run, machine: Mapping[str, Any], found: Measurement) -> None:
    """Write ``table.txt``, a chart where there is one, and at last ``result.json``.

    Args:
        folder: folder of the run.
        run: the run.
        machine: description of the machine.
        found: the measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.txt", f"{found.text}\n")
    if run.kind in ("inference", "training"):
        chart.draw_steps(run.kind, found.result, folder / "chart.png")
    elif run.kind == "scaling":
        chart.draw_scaling(run.variable, found.result, folder / "chart.png")
    elif run.kind == "roofline":
        chart.draw_roofline(found.result, folder / "chart.png")
    record = {"run": dataclasses.asdict(run), "machine": machine, "result": found.result}
    write_text(folder / RECORD, json.dumps(record, indent=1))


def _model(run: Run) -> Measurement:
    peers = ["ours", *([run.against] if run.against else [])]
    models = {peer: in_worker(run.spec.threads, count_model, run.spec, peer) for peer in peers}
    return Measurement(models, report.model_table(models))


def _steps(run: Run) -> Measurement:
    with shared_weights(run.spec, hf=run.against == "hf") as weights:
        result = bench_steps(run.spec, run.kind, weights, run.against)
    text = report.steps_table(run.kind, result, run.spec.batch)
    return Measurement({**result, "weights": weights.description}, text)


def _loader(run: Run) -> Measurement:
    with shared_weights(run.spec) as weights:
        result = in_worker(run.spec.threads, bench_loader, run.spec, weights.path)
    return Measurement(result, report.loader_lines(result))


def _evaluation(run: Run) -> Measurement:
    result = in_worker(run.spec.threads, bench_evaluation, run.images, run.spec.seed)
    return Measurement(result, report.evaluation_table(result))


def _scaling(run: Run) -> Measurement:
    points = bench_scaling(run.spec, run.variable, plain=run.against == "plain")
    return Measurement(points, report.scaling_table(run.variable, points))


def _roofline(run: Run) -> Measurement:
    with shared_weights(run.spec) as weights:
        result = in_worker(run.spec.threads, bench_roofline, run.spec, weights.path)
    return Measurement(result, report.roofline_table(result))


def _paper(run: Run) -> Measurement:
    spec = run.spec
    row = in_worker(
        spec.threads,
        time_evaluation,
        spec.config_file,
        spec.overrides,
        precision=spec.precision,
    )
    return Measurement(dataclasses.asdict(row), report.paper_table([row]))


_MEASURES = {
    "model": _model,
    "inference": _steps,
    "training": _steps,
    "loader": _loader,
    "evaluation": _evaluation,
    "scaling": _scaling,
    "roofline": _roofline,
    "paper": _paper,
}
