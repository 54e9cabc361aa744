"""The number of iterations for which the time of a study is enough on this machine."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from .plan import Study, plan_runs
from .runs import run_study

_TRIAL = 60  # iterations
_FOLDER = ".trial"  # which is not the name of an arm
_SHARE = 0.8  # of the time that goes to iterations; the rest to evaluations and checkpoints


def with_iterations(
    study: Study, output: Path, overrides: Sequence[str] = (), *, threads: int = 1
) -> Study:
    """Replace ``minutes`` of a study by ``iterations``, by the speed of a trial of its first arm.

    The trial is kept in the folder of the study, so that a study that is continued has the same
    length.

    Args:
        study: what to compare.
        output: folder of the study.
        overrides: alternating config keys and values for all arms, applied last.
        threads: number of torch threads.

    Returns:
        The study itself if it has ``iterations``, or no ``minutes``.

    Raises:
        ValueError: the trial has failed, or the config of an arm is faulty.
    """
    if study.minutes is None or study.iterations is not None:
        return study
    trial = dataclasses.replace(study, iterations=_TRIAL, rank_period=None)
    # All arms are planned, so that their configs are checked before anything trains
    first, *_ = plan_runs(trial, output / _FOLDER, [*overrides, "DATASETS.TEST", "()"])
    if failures := run_study([first], threads=threads, watch=lambda done, running: None):
        raise ValueError(failures[0])
    seconds = _seconds_per_iteration(first.path / "metrics.json")
    iterations = max(1, int(_SHARE * 60 * study.minutes / seconds))
    return dataclasses.replace(study, iterations=iterations, minutes=None)


def _seconds_per_iteration(path: Path) -> float:
    """The median of the last records; each is the median of 20 iterations."""
    lines = path.read_text(encoding="utf-8").splitlines()
    times = [record["time"] for record in map(json.loads, lines) if "time" in record]
    return statistics.median(times[-2:])
