"""The records that a run has left in its folder."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from miti_detr.engine.hooks import STEPS_FILE, read_records
from miti_detr.engine.hooks.matching import MATCHES_FILE
from miti_detr.visualize.curves import AR, Run, read_run
from miti_detr.yaml_files import flatten, read_yaml

from .run import FINISHED_FILE, START_FILE
from .runs import EVALUATION_FILE
from .statistics import first_reached

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")
_OF_MASKS = (
    *(f"segm/{name}" for name in ("AP", "AP50", "AP75")),
    *(f"panoptic_seg/{name}" for name in ("PQ", "PQ_th", "PQ_st")),
)
ALL_METRICS = (*METRICS, *_OF_MASKS)
# File -> fact -> its types; numbers are positive.
_FACTS: dict[str, dict[str, tuple[Any, ...]]] = {
    START_FILE: {"weights": (str,), "parameters": (int,), "iterations_per_epoch": (int, float)},
    EVALUATION_FILE: {"seconds": (int, float), "images": (int,)},
    FINISHED_FILE: {"error": (str, type(None))},
}


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The records of one run.

    Attributes:
        path: folder of the run.
        seed: ``SEED`` of its config; None if the config has none.
        metrics: content of ``metrics.json``.
        steps: content of ``steps.json``: loss and gradient norm of every iteration; may be empty.
        matches: content of ``matches.json``: the query matched to each object at each evaluation;
            may be empty.
        config: content of ``config.yaml``, keys joined by dots; may be empty.
        facts: ``weights``, ``parameters``, ``iterations_per_epoch`` (from ``start.json``),
            ``seconds`` (``evaluation.json``) and ``error`` (``finished.json``), as far as known.
    """

    path: Path
    seed: int | None
    metrics: Run
    steps: list[dict[str, float]]
    matches: list[dict[str, Any]]
    config: dict[str, Any]
    facts: dict[str, Any]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Return iterations and values of a metric of :data:`METRICS`, or of any other key.

        With several test sets, the first one by name is used.
        """
        key = metric
        if metric in METRICS:
            pattern = AR if metric == "AR" else re.compile(rf"(.+/)?bbox/{metric}")
            key = next(iter(self.metrics.keys(pattern)), "")
        return self.metrics.series(key)

    def final(self, metric: str) -> float:
        """Return the value of the last evaluation, or NaN if there was none."""
        values = self.curve(metric)[1]
        return float(values[-1]) if len(values) else float("nan")

    def reached(self, ap: float) -> float | None:
        """Return the iteration at which ``ap`` is first reached, or None."""
        return first_reached(*self.curve("AP"), ap)


def metrics_of(runs: Iterable[RunResult]) -> list[str]:
    """List :data:`METRICS`, and those of masks that any of the runs has."""
    known = list(runs)
    return [*METRICS, *(m for m in _OF_MASKS if any(len(run.curve(m)[0]) for run in known))]


def read_result(path: Path, name: str | None = None) -> RunResult:
    """Read the folder of a run, of this project or of another one on Detectron2.

    Args:
        path: the folder, with at least ``metrics.json``.
        name: name of the run; None takes that of the folder.

    Raises:
        FileNotFoundError: there is no ``metrics.json``.
        ValueError: a file is damaged. The message names it.
    """
    config = _read_config(path / "config.yaml")
    seed = config.get("SEED", -1)
    facts: dict[str, Any] = {}
    for file, types in _FACTS.items():
        facts |= _read_facts(path / file, types)
    return RunResult(
        path=path,
        seed=seed if isinstance(seed, int) and seed >= 0 else None,
        metrics=read_run(path, name),
        steps=_read_lines(path / STEPS_FILE, _is_step),
        matches=_read_matches(path / MATCHES_FILE),
        config=config,
        facts=facts,
    )


def stop_reason(path: Path) -> str | None:
    """Return why a finished run stopped early; None if it did not.

    Args:
        path: folder of the run. It may have no metrics.

    Raises:
        ValueError: ``finished.json`` is damaged.
    """
    reason: str | None = _read_facts(path / FINISHED_FILE, _FACTS[FINISHED_FILE]).get("error")
    return reason


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no mapping of config keys")
    return flatten({str(key): value for key, value in content.items()})


def _read_facts(path: Path, types: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, "it holds no JSON object")
    for key, kind in types.items():
        value: Any = content.get(key)
        if key in content and not (isinstance(value, kind) and (int not in kind or value > 0)):
            raise _damaged(path, f"{key} is {value!r}")
    return content


def _read_lines(path: Path, fits: Callable[[Any], bool]) -> list[dict[str, Any]]:
    try:
        records = read_records(str(path))
    except UnicodeDecodeError as error:
        raise _damaged(path, str(error)) from error
    for record in records:
        if not fits(record):
            raise _damaged(path, f"a record is {str(record)[:60]}")
    return records


def _read_matches(path: Path) -> list[dict[str, Any]]:
    records = _read_lines(path, _is_match)
    if len({(len(record["queries"]), len(record["queries"][0])) for record in records}) > 1:
        raise _damaged(path, "the records have different numbers of layers or objects")
    return records


def _is_step(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and isinstance(record.get("iteration"), int)
        and all(isinstance(value, (int, float)) for value in record.values())
    )


def _is_match(record: Any) -> bool:
    if not (isinstance(record, dict) and isinstance(record.get("iteration"), int)):
        return False
    queries = record.get("queries")
    if not (isinstance(record.get("num_queries"), int) and isinstance(queries, list) and queries):
        return False
    rows = [row for row in queries if isinstance(row, list)]
    return len(rows) == len(queries) and all(
        len(row) == len(rows[0]) and all(isinstance(query, int) for query in row) for row in rows
    )


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {' '.join(reason.split())}. Remove the file to compare without it"
    )
