"""What is compared: arms, their seeds and budget, and the runs that follow from them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from miti_detr.engine import setup_config
from miti_detr.engine.launch.checks import check_weights
from miti_detr.files import write_text
from miti_detr.yaml_files import flatten, read_yaml

CHECKPOINT_PERIOD = 100  # iterations; a multiple of the 20 of a record in metrics.json
_MOST_CHECKPOINTS = 50  # of a run; longer ones have a longer period
# An arm is a folder of the study: no separators, no "..", no hidden files.
_NAME = re.compile(r"[\w+-][\w .+-]*")
CHOICE_FOLDER = "choose"  # of the runs on which the arms choose
ARM_PREFIX = "arm://"  # of weights: those of another arm with the same seed
_OTHER_FILES = (CHOICE_FOLDER, "figures", "report.html", "report.json", "report.csv")
_WEIGHTS_KEYS = ("MODEL.WEIGHTS", "MODEL.DETR.FROZEN_WEIGHTS")
# These keys differ between the runs of an arm.
_RUN_KEYS = ("SEED", "OUTPUT_DIR")
_PERIOD_KEY = "SOLVER.CHECKPOINT_PERIOD"
# With ``Study.iterations`` these keys follow from the budget.
_BUDGET_KEYS = (
    *("SOLVER.EPOCHS", "SOLVER.EPOCH_STEPS", "SOLVER.MAX_ITER", "SOLVER.STEPS"),
    "TEST.EVAL_PERIOD",
)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: name of its folder, and its name in all tables.
        config_file: YAML file.
        overrides: alternating config keys and values. ``arm://NAME`` stands for the final weights
            of the arm NAME with the same seed.
        seeds: one run each.
        reference: name of the arm it is compared with; None if it is a reference itself.
        metric: what is compared, of :data:`miti_detr.study.results.ALL_METRICS`.
    """

    name: str
    config_file: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str | None = None
    metric: str = "AP"

    @property
    def starts(self) -> list[str]:
        """Names of the arms whose weights it starts from."""
        values = self.overrides[1::2]
        return [v.removeprefix(ARM_PREFIX) for v in values if v.startswith(ARM_PREFIX)]

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            ValueError: the name cannot be a folder of the study.
        """
        if not _NAME.fullmatch(self.name) or self.name in _OTHER_FILES:
            raise ValueError(
                f"the arm {self.name!r} cannot name a folder of the study. Use letters, digits, "
                f"spaces and . _ + -, no leading dot, and none of {', '.join(_OTHER_FILES)}"
            )


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Values of a config key from which every arm chooses its own.

    Attributes:
        key: config key.
        values: two or more values, increasing.
        seeds: seeds of the runs on which an arm chooses; none of them is measured.
    """

    key: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, their budget, and how the report shows them.

    Attributes:
        title: title of the report.
        arms: in the order of the tables.
        groups: title of a part of the report -> names of its arms.
        iterations: length of every run; None keeps the schedule of each config.
        minutes: the same as a time, for :func:`miti_detr.study.budget.with_iterations`.
        evaluations: number of evaluations of every run, evenly spread; used with ``iterations``.
        aps: values of AP for which the report says when they are reached; if empty, the report
            chooses them.
        threshold: lowest score of a detection in the pictures.
        rank_period: number of iterations between two measurements of rank collapse; None measures
            nothing.
        choose: what each arm chooses before it is measured; None for nothing.
    """

    title: str
    arms: tuple[Arm, ...]
    groups: Mapping[str, Sequence[str]]
    iterations: int | None = None
    minutes: float | None = None
    evaluations: int = 5
    aps: tuple[float, ...] = ()
    threshold: float = 0.5
    rank_period: int | None = None
    choose: Candidates | None = None

    def __post_init__(self) -> None:
        """Check that no seed is used for choosing and for measuring, and what arms start from.

        Raises:
            ValueError: an arm is measured on a seed on which it chooses, or starts from an arm
                that does not come before it or lacks one of its seeds.
        """
        choosing = self.choose.seeds if self.choose else ()
        for arm in self.arms:
            if common := [seed for seed in choosing if seed in arm.seeds]:
                raise ValueError(
                    f"choose: seeds has {common[0]}, on which arm {arm.name} is measured. Choose "
                    "on other seeds"
                )
        seeds: dict[str, tuple[int, ...]] = {}
        for arm in self.arms:
            for name in arm.starts:
                if name not in seeds or not {*arm.seeds} <= {*seeds[name]} or self.choose:
                    raise ValueError(
                        f"arm {arm.name}: overrides have {ARM_PREFIX}{name}. Name an arm that "
                        "comes before it and has all of its seeds, in a study without choose"
                    )
            seeds[arm.name] = arm.seeds

    def fixed_keys(self) -> set[str]:
        """Return the config keys that the study sets in every run."""
        return {*_RUN_KEYS, _PERIOD_KEY, *(_BUDGET_KEYS if self.iterations else ())}


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One training of a study: an arm with a seed.

    Attributes:
        arm: the arm.
        seed: value of ``SEED``.
        path: output folder.
        options: alternating config keys and values for ``arm.config_file``.
        iterations: length of the run.
        rank_period: as in :class:`Study`.
        starts: files of weights that runs of other arms write.
    """

    arm: Arm
    seed: int
    path: Path
    options: tuple[str, ...]
    iterations: int
    rank_period: int | None = None
    starts: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Arm and seed."""
        return f"{self.arm.name}/seed_{self.seed}"


def study_of_configs(config_files: Sequence[str], *, seeds: int, title: str = "") -> Study:
    """Make a study that compares configs with the first one.

    Args:
        config_files: YAML files; the arms are named after them.
        seeds: number of seeds, counted from 0.
        title: title of the report; "" joins the names of the arms.

    Raises:
        ValueError: two files have the same name, or a name cannot be that of a folder.
    """
    names = [Path(file).stem for file in config_files]
    if len(set(names)) < len(names):
        raise ValueError(
            f"the configs are called {', '.join(names)}: to give arms names of their own, write a "
            "study file (docs/compare.md)"
        )
    arms = tuple(
        Arm(name, file, seeds=tuple(range(seeds)), reference=names[0] if i else None)
        for i, (name, file) in enumerate(zip(names, config_files, strict=True))
    )
    return Study(title or " and ".join(names), arms, {"Comparison": names})


def plan_runs(study: Study, output: Path, overrides: Sequence[str] = ()) -> list[StudyRun]:
    """List the runs of a study: all arms with the first seed, then all with the second, and so on.

    The config of each arm is read, checked, and kept in ``output/ARM/arm.yaml``.

    Args:
        study: what to compare.
        output: folder of the study.
        overrides: alternating config keys and values for all arms, applied last.

    Raises:
        ValueError: a config is faulty, or differs from the one that an arm in ``output`` was
            started with.
        FileNotFoundError: the initial weights of an arm do not exist.
    """
    runs = []
    for arm in study.arms:
        own = [*arm.overrides, *overrides]
        cfg = _setup(arm, own)
        if cfg.INPUT.PATCHES.NUMBER > 0:
            raise ValueError(
                f"arm {arm.name} is a pre-training, which detects no objects. Compare models that "
                "are fine-tuned from it: set MODEL.WEIGHTS"
            )
        options = [*own, *_schedule(cfg, study)]
        cfg = _setup(arm, options)
        values = dict(zip(own[::2], own[1::2], strict=True))
        try:
            for key in _WEIGHTS_KEYS:
                if not values.get(key, "").startswith(ARM_PREFIX):
                    check_weights(cfg, key=key)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"arm {arm.name}: {error}") from error
        _keep_config(cfg, output / arm.name / "arm.yaml")
        for seed in arm.seeds:
            path = output / arm.name / f"seed_{seed}"
            starts = {
                f"{ARM_PREFIX}{name}": output / name / f"seed_{seed}" / "model_final.pth"
                for name in arm.starts
            }
            words = [str(starts.get(word, word)) for word in options]
            words += ["SEED", str(seed), "OUTPUT_DIR", str(path)]
            budget = (cfg.SOLVER.MAX_ITER, study.rank_period)
            runs.append(StudyRun(arm, seed, path, tuple(words), *budget, (*starts.values(),)))
    return sorted(runs, key=lambda run: run.seed)  # a stable sort keeps the order of the arms


def _setup(arm: Arm, options: Sequence[str]) -> CfgNode:
    try:
        return setup_config(arm.config_file, options)
    except KeyError as error:
        raise ValueError(f"arm {arm.name}: {error.args[0]}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"arm {arm.name}: {error}") from error


def _schedule(cfg: CfgNode, study: Study) -> list[str]:
    """Options for ``study.iterations``; the learning rate drops in proportion to the config's."""
    if study.iterations is None:
        return [_PERIOD_KEY, str(CHECKPOINT_PERIOD)]
    solver, iterations = cfg.SOLVER, study.iterations
    records = iterations // (20 * _MOST_CHECKPOINTS)
    in_epochs = solver.EPOCHS > 0
    length = solver.EPOCHS if in_epochs else solver.MAX_ITER
    drops = solver.EPOCH_STEPS if in_epochs else solver.STEPS
    steps = tuple(round(drop * iterations / length) for drop in drops)
    values = (0, (), iterations, steps, max(1, round(iterations / study.evaluations)))
    pairs: dict[str, Any] = {_PERIOD_KEY: max(CHECKPOINT_PERIOD, 20 * records)}
    pairs |= dict(zip(_BUDGET_KEYS, values, strict=True))
    return [word for key, value in pairs.items() for word in (key, str(value))]


def _keep_config(cfg: CfgNode, path: Path) -> None:
    kept = cfg.clone()
    for key in _RUN_KEYS:
        del kept[key]
    text = kept.dump()
    if not path.is_file():
        write_text(path, text)
        return
    then = read_yaml(path)
    if not isinstance(then, dict):
        raise ValueError(f"{path} holds no config. Remove the folder {path.parent}")
    now, then = flatten(yaml.safe_load(text)), flatten(then)
    changed = [key for key in {**then, **now} if now.get(key) != then.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{path.parent} was started with {key} {then.get(key)!r}, which is now "
            f"{now.get(key)!r}. Choose another --output, or remove that folder"
        )
