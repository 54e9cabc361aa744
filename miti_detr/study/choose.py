"""Each arm chooses its own value of a config key, on other seeds than those it is measured on."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from miti_detr.files import write_text
from miti_detr.report.page import Cell, Table

from .plan import CHOICE_FOLDER, Arm, Study, StudyRun, plan_runs
from .results import read_result, stop_reason
from .statistics import mean_and_spread

CHOICE_FILE = "choice.json"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an arm chooses.

    Attributes:
        arm: name of the arm.
        key: config key.
        aps: value of the key, increasing -> seed -> final AP in percent.
    """

    arm: str
    key: str
    aps: Mapping[float, Mapping[int, float]]

    @property
    def value(self) -> float:
        """The value with the highest mean AP; of several, the smallest."""
        return max(self.aps, key=lambda value: fmean(self.aps[value].values()))

    @property
    def remark(self) -> str:
        """What limits the choice: the chosen value is the first or the last one, or ""."""
        values = [*self.aps]
        if self.value in (values[0], values[-1]):
            end = "smallest" if self.value == values[0] else "largest"
            return f"at the edge: the {end} value is the best one"
        return ""


def plan_choosing(study: Study, output: Path, overrides: Sequence[str] = ()) -> list[StudyRun]:
    """List the runs on which the arms of a study choose; they are evaluated at the end only.

    Each pair of an arm and a value is an arm of its own, in ``output/choose/ARM VALUE``.

    Args:
        study: a study with ``choose``.
        output: folder of the study.
        overrides: alternating config keys and values for all arms, applied last.

    Raises:
        ValueError: the key is set elsewhere as well, or as for :func:`plan_runs`.
        FileNotFoundError: as for :func:`plan_runs`.
    """
    assert study.choose is not None
    key = study.choose.key
    for arm in study.arms:
        if key in {*study.fixed_keys(), *arm.overrides[::2], *overrides[::2]}:
            raise ValueError(
                f"choose: key is {key}, which the study, the overrides of arm {arm.name} or the "
                "command line also set. Set it in one place"
            )
    arms = tuple(
        dataclasses.replace(_with_value(arm, key, value), name=name, seeds=study.choose.seeds)
        for arm in study.arms
        for value, name in _names(study, arm).items()
    )
    choosing = dataclasses.replace(study, arms=arms, evaluations=1, rank_period=None, choose=None)
    return plan_runs(choosing, output / CHOICE_FOLDER, overrides)


def choose_values(
    study: Study, runs: Sequence[StudyRun], output: Path
) -> tuple[Study, list[Choice]]:
    """Let the arms choose, and write ``choice.json`` into the folder of each.

    A run that diverged or detected nothing has an AP of 0.

    Args:
        study: a study with ``choose``.
        runs: finished runs of :func:`plan_choosing`.
        output: folder of the study.

    Returns:
        The study in which each arm has its own value, and the choices.
    """
    assert study.choose is not None
    aps = {(run.arm.name, run.seed): _final_ap(run) for run in runs}
    choices, arms = [], []
    for arm in study.arms:
        of_arm = {
            value: {seed: aps[name, seed] for seed in study.choose.seeds}
            for value, name in _names(study, arm).items()
        }
        choice = Choice(arm.name, study.choose.key, of_arm)
        content = {"key": choice.key, "value": choice.value, "remark": choice.remark, "AP": of_arm}
        write_text(output / arm.name / CHOICE_FILE, json.dumps(content, indent=1))
        choices.append(choice)
        arms.append(_with_value(arm, choice.key, choice.value))
    return dataclasses.replace(study, arms=tuple(arms), choose=None), choices


def choices_table(choices: Sequence[Choice]) -> Table:
    """Return a table with one row per arm: the AP of all values, and the chosen one."""
    rows: list[list[Cell]] = []
    for choice in choices:
        cells = {value: mean_and_spread([*aps.values()]) for value, aps in choice.aps.items()}
        (cells[choice.value] or {})["note"] = "chosen"
        chosen = {"mean": choice.value, "text": str(choice.value)}
        rows.append([choice.arm, *cells.values(), chosen, choice.remark])
    first = choices[0]
    return Table(
        "choice",
        f"Choice of {first.key}",
        ["model", *map(str, first.aps), "chosen", "remark"],
        rows,
        note=f"AP by value, mean \u00b1 standard deviation over the seeds "
        f"{', '.join(map(str, first.aps[first.value]))}, which are not measured below. A run that "
        "diverged has an AP of 0. The highest mean is chosen; of equal ones, the smallest value.",
    )


def _names(study: Study, arm: Arm) -> dict[float, str]:
    """Value -> name of the arm that has it."""
    values = study.choose.values if study.choose else ()
    return {value: f"{arm.name} {value}" for value in values}


def _with_value(arm: Arm, key: str, value: float) -> Arm:
    return dataclasses.replace(arm, overrides=(*arm.overrides, key, str(value)))


def _final_ap(run: StudyRun) -> float:
    if stop_reason(run.path):
        return 0.0
    ap = read_result(run.path, run.name).final("AP")
    return ap if math.isfinite(ap) else 0.0
