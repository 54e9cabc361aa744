"""Runs planned from a study, and runs that are killed."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from detectron2.engine import default_argument_parser, defaults
from detectron2.utils.events import get_event_storage

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine import NonFiniteError, Trainer, setup_config
from miti_detr.study import plan as plan_module
from miti_detr.study import run as run_module
from miti_detr.study import runs as runs_module
from miti_detr.study.comparison import compare_study
from miti_detr.study.plan import (
    Arm,
    Study,
    StudyRun,
    plan_runs,
    study_of_configs,
)
from miti_detr.study.study_file import read_study
from miti_detr.study.tables import group_tables, runs_table
from tests.engine.hooks.test_matching import SMALL
from tests.helpers import ROOT
from tests.small_shapes import small_shapes

DETR, MITI = (str(ROOT / f"configs/shapes/{name}.yaml") for name in ("detr", "miti_detr"))
WORDS = [str(word) for pair in SMALL.items() for word in pair]


def test_two_configs_of_one_name() -> None:
    with pytest.raises(ValueError, match="detr, detr: to give arms names of their own"):
        study_of_configs([DETR, DETR], seeds=1)


@pytest.mark.slow
def test_the_study_of_make_compare(tmp_path: Path) -> None:
    """It has five arms with three seeds at 6 + 6 layers, three learning rates and three depths."""
    study = read_study(ROOT / "configs/studies/shapes_6x6.yaml")
    runs = plan_runs(study, tmp_path)
    assert len({run.path for run in runs}) == len(runs)
    assert {run.iterations for run in runs} == {study.iterations}
    configs = {run.arm.name: setup_config(run.arm.config_file, run.options) for run in runs}
    first, rates, depths = study.groups.values()
    detr = {name: cfg.MODEL.DETR for name, cfg in configs.items()}
    places = {(detr[name].LAYER_RESIDUAL, detr[name].LAYER_RESIDUAL_IN) for name in first}
    assert places == {
        ("none", "both"),
        ("before_norm", "both"),
        ("after_norm", "both"),
        ("before_norm", "encoder"),
        ("before_norm", "decoder"),
    }
    assert all(len(arm.seeds) == 3 for arm in study.arms if arm.name in first)
    grid = {(detr[name].LAYER_RESIDUAL, configs[name].SOLVER.BASE_LR) for name in rates}
    assert len(grid) == 6
    grid = {(detr[n].LAYER_RESIDUAL, detr[n].ENC_LAYERS, detr[n].DEC_LAYERS) for n in depths}
    assert len(grid) == 6
    assert {(encoder, decoder) for _, encoder, decoder in grid} == {(2, 2), (6, 6), (12, 6)}
    for arm in study.arms:  # arm and reference differ only in the residual
        if arm.reference:
            one, other = configs[arm.name].clone(), configs[arm.reference].clone()
            one.OUTPUT_DIR, one.SEED = other.OUTPUT_DIR, other.SEED
            for key in ("LAYER_RESIDUAL", "LAYER_RESIDUAL_IN"):
                one.MODEL.DETR[key] = other.MODEL.DETR[key]
            assert one == other, arm.name


def test_a_pretrained_start_is_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained unless the file exists. The study has 8 arms with 3 seeds."""
    monkeypatch.chdir(tmp_path)
    study = read_study(ROOT / "configs/studies/shapes_up_detr.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"arm detr_pretrained: MODEL\.WEIGHTS: there is no"
    ):
        plan_runs(study, tmp_path / "study")
    weights = tmp_path / "output/shapes/up_detr_pretrain/model_final.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    runs = plan_runs(study, tmp_path / "study")
    assert len(runs) == 24
    starts = {
        run.arm.name: dict(zip(run.options[::2], run.options[1::2], strict=True)) for run in runs
    }
    assert starts["miti"]["MODEL.WEIGHTS"] == ""
    assert "MODEL.WEIGHTS" not in starts["miti_tenth_pretrained"]  # the config sets it
    assert starts["miti_tenth_pretrained"]["DATASETS.TRAIN_SHARE"] == "0.1"


def test_an_arm_starts_from_the_weights_of_another_one(tmp_path: Path) -> None:
    """Masks of each seed are trained on the detector of that seed; ``arm.yaml`` has no seed."""
    study = read_study(ROOT / "configs/studies/shapes_masks.yaml")
    runs = {run.name: run for run in plan_runs(study, tmp_path)}
    assert len(runs) == 18
    for name, key in (("masks", "MODEL.DETR.FROZEN_WEIGHTS"), ("panoptic", "MODEL.WEIGHTS")):
        run = runs[f"miti_detr_{name}/seed_2"]
        weights = tmp_path / "miti_detr" / "seed_2" / "model_final.pth"
        assert run.starts == (weights,)
        assert run.options[run.options.index(key) + 1] == str(weights)
        assert "arm://miti_detr\n" in (tmp_path / f"miti_detr_{name}" / "arm.yaml").read_text()
    assert {arm.name: arm.metric for arm in study.arms if arm.reference} == {
        "miti_detr": "AP",
        "miti_detr_masks": "segm/AP",
        "miti_detr_panoptic": "panoptic_seg/PQ",
    }


def test_a_pretraining_is_no_arm(tmp_path: Path) -> None:
    study = study_of_configs([str(ROOT / "configs/shapes/up_detr_pretrain.yaml")], seeds=1)
    with pytest.raises(ValueError, match="arm up_detr_pretrain is a pre-training"):
        plan_runs(study, tmp_path)


def test_the_schedule_follows_the_budget(tmp_path: Path) -> None:
    """Drops at 2900 of 3600 iterations, and at 40 of 50 epochs, become 290 and 288 of 360."""
    for overrides, steps in (
        (("SOLVER.MAX_ITER", "3600", "SOLVER.STEPS", "(2900,)"), (290,)),
        (("SOLVER.EPOCHS", "50", "SOLVER.EPOCH_STEPS", "(40,)"), (288,)),
    ):
        arm = Arm("a", DETR, overrides, seeds=(4,))
        study = Study("", (arm,), {}, iterations=360, evaluations=3)
        (run,) = plan_runs(study, tmp_path / str(steps[0]))
        cfg = setup_config(run.arm.config_file, run.options)
        solver = cfg.SOLVER
        assert (solver.MAX_ITER, solver.EPOCHS) == (360, 0)
        assert list(solver.STEPS) == list(steps)
        assert (cfg.TEST.EVAL_PERIOD, cfg.SEED) == (120, 4)
        assert run.iterations == 360


def test_an_arm_that_was_started_with_another_config(tmp_path: Path) -> None:
    study = study_of_configs([DETR], seeds=2)
    assert [run.name for run in plan_runs(study, tmp_path)] == ["detr/seed_0", "detr/seed_1"]
    plan_runs(study_of_configs([DETR, MITI], seeds=3), tmp_path)  # more runs are allowed
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR 0\.001, which is now 0\.1"):
        plan_runs(study, tmp_path, ["SOLVER.BASE_LR", "0.1"])


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plan_module, "CHECKPOINT_PERIOD", 20)
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "not here")
    with small_shapes(tmp_path / "datasets"):
        yield


class Killed(BaseException):
    """An exception that no code catches."""


def train(run: StudyRun) -> None:
    args: argparse.Namespace = default_argument_parser().parse_args(
        ["--config-file", run.arm.config_file, *run.options]
    )
    args.rank_period = run.rank_period
    run_module.main(args)


def tables_of(study: Study, runs: list[StudyRun]) -> str:
    """Return all tables as text, in which NaN equals NaN."""
    comparison = compare_study(study, runs)
    tables = [*group_tables(comparison.arms, comparison), runs_table(comparison)]
    return json.dumps([dataclasses.asdict(table) for table in tables], indent=1)


def records_of(run: StudyRun) -> str:
    """Return the records of ``metrics.json`` without times."""
    lines = (run.path / "metrics.json").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    timeless = [
        {k: v for k, v in r.items() if "time" not in k and k != "eta_seconds"} for r in found
    ]
    return json.dumps(timeless, indent=1)


@pytest.mark.slow
@pytest.mark.usefixtures("shapes")
def test_a_killed_study_gives_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 iterations with evaluations and checkpoints every 20; killed in a step before the first
    checkpoint, in the first evaluation, before the first checkpoint is written, and in the last
    evaluation."""
    arm = Arm("miti", MITI, seeds=(0,))
    study = Study("", (arm,), {"All": ["miti"]}, iterations=40, evaluations=2)
    (straight,) = plan_runs(study, tmp_path / "straight", WORDS)
    train(straight)

    (killed,) = plan_runs(study, tmp_path / "killed", WORDS)
    for place, iteration in (("step", 7), ("test", 19), ("save", 19), ("test", 40)):
        with monkeypatch.context() as patch:
            kill_at(patch, place, iteration)
            with pytest.raises(Killed):
                train(killed)
        assert not runs_module.is_finished(killed)
    train(killed)
    assert tables_of(study, [killed]) == tables_of(study, [straight])
    assert records_of(killed) == records_of(straight)
    assert [path.name for path in killed.path.glob("*.pth")] == ["model_final.pth"]


def kill_at(patch: pytest.MonkeyPatch, place: str, iteration: int) -> None:
    """Make a run die when it enters a function at an iteration."""
    owner, name = {
        "step": (run_module.StopWithParent, "before_step"),
        "test": (defaults, "inference_on_dataset"),
        "save": (MitiDetrCheckpointer, "save"),
    }[place]
    original = getattr(owner, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        if get_event_storage().iter == iteration:
            raise Killed
        return original(*args, **kwargs)

    patch.setattr(owner, name, die)


@pytest.mark.slow
@pytest.mark.usefixtures("shapes")
def test_a_run_that_diverges_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(trainer: Any) -> None:
        raise NonFiniteError("the loss is not finite")

    monkeypatch.setattr(Trainer, "train", diverge)
    (run,) = plan_runs(Study("", (Arm("a", DETR, seeds=(0,)),), {}), tmp_path, WORDS)
    train(run)
    assert runs_module.is_finished(run)
    assert "not finite" in (run.path / "finished.json").read_text()
