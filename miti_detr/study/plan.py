"""A study: configs to compare, their seeds and their budget."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from miti_detr.engine import setup_config
from miti_detr.engine.launch import check_weights
from miti_detr.files import write_text

CHECKPOINT_PERIOD = 100  # iterations; a multiple of the 20 of a record in metrics.json
_NAME = re.compile(r"[\w.+-]+")
_STUDY_KEYS = (
    *("title", "arms", "groups", "overrides", "iterations", "evaluations", "seeds", "aps"),
    *("threshold", "rank_period"),
)
# Differ between the runs of an arm, or between the places of a study
_OWN_TO_A_RUN = ("SEED", "OUTPUT_DIR")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: of its folder, and in all tables.
        config_file: YAML.
        overrides: alternating config keys and values.
        seeds: one run each.
        reference: name of the arm that it is compared with; None: it is a reference itself.
    """

    name: str
    config_file: str
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms, their budget, and how the report shows them.

    Attributes:
        title: of the report.
        arms: by rising place in the tables.
        groups: title of a part of the report -> names of its arms.
        iterations: of every run; None: each config's own schedule.
        evaluations: of every run, evenly spread; only with ``iterations``.
        aps: values of AP for which the report says when they are reached; empty: chosen by it.
        threshold: least score of a detection in the pictures.
        rank_period: iterations between two measurements of rank collapse; None: none.
    """

    title: str
    arms: tuple[Arm, ...]
    groups: Mapping[str, Sequence[str]]
    iterations: int | None = None
    evaluations: int = 5
    aps: tuple[float, ...] = ()
    threshold: float = 0.5
    rank_period: int | None = None


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One training of a study: an arm with a seed.

    Attributes:
        arm: of the study.
        seed: ``SEED``.
        path: output folder.
        options: alternating config keys and values for ``arm.config_file``.
        iterations: its length.
        rank_period: iterations between two measurements of rank collapse; None: none.
    """

    arm: Arm
    seed: int
    path: Path
    options: tuple[str, ...]
    iterations: int
    rank_period: int | None = None

    @property
    def name(self) -> str:
        """Arm and seed."""
        return f"{self.arm.name}/seed_{self.seed}"


def study_of_configs(config_files: Sequence[str], *, seeds: int, title: str = "") -> Study:
    """Make a study of configs that are compared with the first one.

    Args:
        config_files: YAML files; the arms bear their names.
        seeds: how many, from 0.
        title: None: the names.

    Raises:
        ValueError: two files have the same name.
    """
    names = [Path(file).stem for file in config_files]
    if len(set(names)) < len(names):
        raise ValueError(
            f"the configs are called {', '.join(names)}: for two arms of one name write a study "
            "file, see docs/compare.md"
        )
    arms = tuple(
        Arm(name, file, seeds=tuple(range(seeds)), reference=names[0] if i else None)
        for i, (name, file) in enumerate(zip(names, config_files, strict=True))
    )
    return Study(title or " and ".join(names), arms, {"Comparison": names})


def read_study(path: str | Path) -> Study:
    """Read a study file; ``docs/compare.md`` describes it.

    Args:
        path: YAML; its configs are relative to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown or missing, or a name is not one of an arm.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_keys(f"{path}", content, _STUDY_KEYS, needed=("arms",))
    common = content.get("overrides") or {}
    arms = tuple(
        _read_arm(path, name, entry, common, int(content.get("seeds", 3)))
        for name, entry in dict(content["arms"]).items()
    )
    study = Study(
        title=content.get("title", path.stem),
        arms=arms,
        groups=content.get("groups") or {"Comparison": [arm.name for arm in arms]},
        iterations=content.get("iterations"),
        evaluations=content.get("evaluations", Study.evaluations),
        aps=tuple(content.get("aps", ())),
        threshold=content.get("threshold", Study.threshold),
        rank_period=content.get("rank_period"),
    )
    names = {arm.name for arm in arms}
    named = [name for group in study.groups.values() for name in group]
    for name in [*named, *(arm.reference for arm in arms if arm.reference)]:
        if name not in names:
            raise ValueError(f"{path}: {name!r} is no arm; there are {', '.join(sorted(names))}")
    return study


def _read_arm(path: Path, name: str, entry: Any, common: dict[str, Any], seeds: int) -> Arm:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{path}: {name!r} cannot name a folder; use letters, digits, . _ + -")
    place = f"{path}: arm {name}"
    _check_keys(place, entry, ("config", "overrides", "seeds", "reference"), needed=("config",))
    overrides = {**common, **(entry.get("overrides") or {})}
    return Arm(
        name,
        str((path.parent / entry["config"]).resolve()),
        tuple(word for key, value in overrides.items() for word in (key, str(value))),
        tuple(range(int(entry.get("seeds", seeds)))),
        entry.get("reference"),
    )


def _check_keys(place: str, entry: Any, known: Sequence[str], needed: Sequence[str]) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is no mapping of {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise ValueError(f"{place}: unknown key {key!r}; possible: {', '.join(known)}")
    for key in needed:
        if key not in entry:
            raise ValueError(f"{place}: {key!r} is missing")


def plan_runs(study: Study, output: Path, overrides: Sequence[str] = ()) -> list[StudyRun]:
    """List the runs of a study, all arms of the first seed before the second.

    The config of each arm is read and checked, and kept in ``output/ARM/arm.yaml``.

    Args:
        study: what to compare.
        output: folder of the study.
        overrides: alternating config keys and values for all arms, applied last.

    Raises:
        ValueError: a config is faulty, or not the one that an arm in ``output`` was begun with.
        FileNotFoundError: the weights that an arm starts from are not there.
    """
    runs = []
    for arm in study.arms:
        own = [*arm.overrides, *overrides]
        cfg = setup_config(arm.config_file, own)
        if cfg.INPUT.PATCHES.NUMBER > 0:
            raise ValueError(
                f"arm {arm.name} is a pre-training, which finds no objects: compare what is "
                "fine-tuned from it, by MODEL.WEIGHTS"
            )
        options = [*own, *_schedule(cfg, study)]
        cfg = setup_config(arm.config_file, options)
        _check_start(arm, cfg)
        _keep_config(cfg, output / arm.name / "arm.yaml")
        for seed in arm.seeds:
            path = output / arm.name / f"seed_{seed}"
            own_to_run = ("SEED", str(seed), "OUTPUT_DIR", str(path))
            runs.append(
                StudyRun(
                    arm,
                    seed,
                    path,
                    (*options, *own_to_run),
                    cfg.SOLVER.MAX_ITER,
                    study.rank_period,
                )
            )
    return sorted(runs, key=lambda run: run.seed)  # keeps the order of the arms


def _check_start(arm: Arm, cfg: CfgNode) -> None:
    try:
        check_weights(cfg)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"arm {arm.name}: {error}") from error


def _schedule(cfg: CfgNode, study: Study) -> list[str]:
    """Keys of a schedule of ``study.iterations``, its drops in proportion to the config's own."""
    period = ["SOLVER.CHECKPOINT_PERIOD", str(CHECKPOINT_PERIOD)]
    if study.iterations is None:
        return period
    solver, iterations = cfg.SOLVER, study.iterations
    in_epochs = solver.EPOCHS > 0
    length = solver.EPOCHS if in_epochs else solver.MAX_ITER
    drops = solver.EPOCH_STEPS if in_epochs else solver.STEPS
    steps = tuple(round(drop * iterations / length) for drop in drops)
    values = {
        "SOLVER.EPOCHS": 0,
        "SOLVER.EPOCH_STEPS": (),
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": steps,
        "TEST.EVAL_PERIOD": max(1, round(iterations / study.evaluations)),
    }
    return [*period, *(word for key, value in values.items() for word in (key, str(value)))]


def _keep_config(cfg: CfgNode, path: Path) -> None:
    kept = cfg.clone()
    for key in _OWN_TO_A_RUN:
        del kept[key]
    text = kept.dump()
    if not path.is_file():
        write_text(path, text)
        return
    now, then = (flatten(yaml.safe_load(t)) for t in (text, path.read_text(encoding="utf-8")))
    changed = [key for key in {**then, **now} if now.get(key) != then.get(key)]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{path.parent} was begun with {key} {then.get(key)!r}, now it is {now.get(key)!r}: "
            "name another --output, or remove that folder"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result
