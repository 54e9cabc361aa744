"""Series that the tables and figures of a comparison read from the records of a run."""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from .comparison import ArmResult
from .results import RunResult
from .statistics import changed_share

_RANK_KEY = re.compile(r"rank/([^/]+)/layer(\d+)/([^/]+)")


def step_series(run: RunResult, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return iterations and values of a training metric, for every iteration if recorded."""
    if not run.steps:
        return run.curve(key)
    points = [(record["iteration"], record[key]) for record in run.steps if key in record]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=int), np.array(values, dtype=float)


def has_epochs(arms: Sequence[ArmResult]) -> bool:
    """Return whether all runs know the length of an epoch."""
    return all("iterations_per_epoch" in run.facts for arm in arms for run in arm.runs)


def match_changes(run: RunResult) -> tuple[np.ndarray, np.ndarray]:
    """Return iterations (E,) and shares (E, L) of changed matches, from the second record on."""
    queries = [np.array(record["queries"]) for record in run.matches]
    pairs = itertools.pairwise(queries)
    steps = np.array([record["iteration"] for record in run.matches[1:]])
    return steps, np.array([changed_share(before, after) for before, after in pairs])


def mean_changes(run: RunResult) -> np.ndarray:
    """Return the share of changed matches (L,) of a run; empty with fewer than two records."""
    changes = match_changes(run)[1]
    return np.nanmean(changes, axis=0) if len(changes) else np.empty(0)


def rank_keys(arms: Sequence[ArmResult]) -> dict[tuple[str, str], list[str]]:
    """Return the metrics ``rank/STACK/layerL/MEASURE`` that at least one run has.

    Returns:
        (stack, measure) -> keys of the layers, in order.
    """
    records = [
        record for arm in arms for run in arm.runs for record in run.metrics.records.values()
    ]
    found: dict[tuple[str, str], dict[int, str]] = {}
    for key in sorted({key for record in records for key in record}):
        if match := _RANK_KEY.fullmatch(key):
            found.setdefault((match[1], match[3]), {})[int(match[2])] = key
    return {names: [keys[i] for i in sorted(keys)] for names, keys in found.items()}


def last_layer(run: RunResult, keys: Sequence[str]) -> str:
    """Return the last of ``keys`` that a run has recorded; arms may differ in depth."""
    recorded = [key for key in keys if np.isfinite(run.final(key))]
    return (recorded or [*keys])[-1]
