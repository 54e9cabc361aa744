"""What is compared: runs, grouped into arms, as read from their folders."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from miti_detr.visualize.curves import AP, AR, run_names

from .choose import Choice
from .plan import Study, StudyRun
from .results import RunResult, read_result, stop_reason
from .run import FINISHED_FILE

# Config keys that differ between runs of the same arm.
RUN_KEYS = re.compile(r"SEED|OUTPUT_DIR|VERSION|DATALOADER\.NUM_WORKERS")


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """Runs that differ only in their seed.

    Attributes:
        name: name in tables and legends.
        runs: runs, sorted by seed.
        reference: name of the arm it is compared with.
        metric: what is compared.
    """

    name: str
    runs: list[RunResult]
    reference: str | None = None
    metric: str = "AP"

    def values(self, metric: str) -> list[float]:
        """Return the last value of a metric, for each run."""
        return [run.final(metric) for run in self.runs]

    def pairs(self, other: "ArmResult") -> list[tuple[RunResult, RunResult]]:
        """Return the runs of both arms that have the same seed."""
        theirs = {run.seed: run for run in other.runs if run.seed is not None}
        return [(run, theirs[run.seed]) for run in self.runs if run.seed in theirs]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a report is made from.

    Attributes:
        title: title of the report.
        groups: title of a part -> its arms.
        aps: values of AP for which the report says when they are reached.
        threshold: lowest score of a detection in the pictures.
        missing: one sentence for each thing that is missing.
        choices: what the arms have chosen before, if anything.
    """

    title: str
    groups: Mapping[str, list[ArmResult]]
    aps: tuple[float, ...]
    threshold: float
    missing: list[str]
    choices: Sequence[Choice] = ()

    @property
    def arms(self) -> list[ArmResult]:
        """All arms, each once."""
        return list({arm.name: arm for arms in self.groups.values() for arm in arms}.values())


def compare_study(
    study: Study, runs: Sequence[StudyRun], choices: Sequence[Choice] = ()
) -> Comparison:
    """Read the results of the runs of a study.

    Args:
        study: the study.
        runs: runs from :func:`~miti_detr.study.plan.plan_runs`.
        choices: see :class:`Comparison`.

    Raises:
        ValueError: no run has finished.
    """
    missing, found = [], {}
    for run in runs:
        if not (run.path / FINISHED_FILE).is_file():
            missing.append(f"{run.name} has not finished and is left out.")
            continue
        if reason := stop_reason(run.path):
            missing.append(f"{run.name} stopped early: {reason}")
        else:
            found[run.name] = read_result(run.path, run.name)
    arms = {}
    for arm in study.arms:
        results = [found[run.name] for run in runs if run.arm == arm and run.name in found]
        if results:
            arms[arm.name] = ArmResult(arm.name, results, arm.reference, arm.metric)
    if not arms:
        raise ValueError(f"no run has finished: {' '.join(missing)}")
    groups = {
        title: [arms[name] for name in names if name in arms]
        for title, names in study.groups.items()
    }
    groups = {title: members for title, members in groups.items() if members}
    aps = study.aps or choose_aps(list(arms.values()))
    return Comparison(study.title, groups, aps, study.threshold, missing, choices)


def compare_runs(
    paths: Sequence[Path], *, aps: Sequence[float] = (), threshold: float = 0.5
) -> Comparison:
    """Read existing runs; runs whose configs differ only in the seed form one arm.

    The first arm is the reference of the others. A run without ``config.yaml`` is an arm of its
    own.

    Args:
        paths: folders with ``metrics.json``.
        aps: see :class:`Comparison`; if empty, they are chosen by :func:`choose_aps`.
        threshold: lowest score in the pictures.
    """
    names = run_names(paths)
    results = [read_result(path, name) for path, name in zip(paths, names, strict=True)]
    members: dict[str, list[tuple[str, RunResult]]] = {}
    for name, result in zip(names, results, strict=True):
        own = {k: v for k, v in result.config.items() if not RUN_KEYS.fullmatch(k)}
        key = json.dumps(own, sort_keys=True, default=str) if own else name
        members.setdefault(key, []).append((name, result))
    arms: list[ArmResult] = []
    for entries in members.values():
        name = _arm_name([name for name, _ in entries], [arm.name for arm in arms])
        runs = sorted(
            (result for _, result in entries), key=lambda r: (r.seed is None, r.seed or 0)
        )
        arms.append(ArmResult(name, runs, arms[0].name if arms else None))
    missing = _missing(arms)
    title = " and ".join(arm.name for arm in arms)
    return Comparison(title, {"Runs": arms}, tuple(aps) or choose_aps(arms), threshold, missing)


def choose_aps(arms: Sequence[ArmResult]) -> tuple[float, ...]:
    """Return 25, 50 and 75 percent of the reference's final AP, rounded to two digits."""
    finals = [value for value in arms[0].values("AP") if value > 0]
    if not finals:
        return ()
    return tuple(float(f"{share * np.mean(finals):.2g}") for share in (0.25, 0.5, 0.75))


def common_beginning(names: Sequence[str]) -> str:
    """Return the longest text that all names begin with."""
    common = names[0]
    for name in names[1:]:
        while not name.startswith(common):
            common = common[:-1]
    return common


def _arm_name(names: Sequence[str], taken: Sequence[str]) -> str:
    """Name several runs by the common beginning of their names."""
    common = common_beginning(names)
    common = re.sub(r"[/_.-]*(seed)?[/_.-]*$", "", common) if len(names) > 1 else common
    return common if common and common not in taken else " + ".join(names)


def _missing(arms: Sequence[ArmResult]) -> list[str]:
    """Describe in sentences which records runs lack."""
    missing = []
    for arm in arms:
        for run in arm.runs:
            lacks = {
                "total_loss": len(run.curve("total_loss")[0]) == 0,
                "bbox/AP": not run.metrics.keys(AP),
                "bbox/AR (AR@100)": not run.metrics.keys(AR),
                "config.yaml": not run.config,
                "a seed in its config": bool(run.config) and run.seed is None,
            }
            if any(lacks.values()):
                listed = ", ".join(key for key, lacking in lacks.items() if lacking)
                missing.append(f"{run.metrics.name} lacks {listed}.")
    lengths = {max(run.metrics.records) for arm in arms for run in arm.runs}
    if len(lengths) > 1:
        missing.append(
            f"The runs have different lengths: their last records are from the iterations "
            f"{', '.join(map(str, sorted(lengths)))}."
        )
    return missing
