"""Each arm chooses its own value of a key, on other seeds than those it is measured on."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from miti_detr.cli.main import main
from miti_detr.engine import setup_config
from miti_detr.report.page import cell_text
from miti_detr.study import runs as runs_module
from miti_detr.study.choose import Choice, choices_table, plan_choosing
from miti_detr.study.plan import Arm, Candidates, Study, StudyRun, plan_runs
from miti_detr.study.study_file import read_study
from tests.helpers import ROOT
from tests.study.made_runs import write_run

DETR = str(ROOT / "configs/shapes/detr.yaml")
KEY = "SOLVER.BASE_LR"
CANDIDATES = Candidates(KEY, (0.1, 0.2, 0.3), (100, 101))


def test_the_highest_mean_is_chosen_and_of_equal_ones_the_smallest() -> None:
    """Means of 10, 15, 15: the second value, which is not at an edge."""
    choice = Choice("a", KEY, {0.1: {1: 10, 2: 10}, 0.2: {1: 10, 2: 20}, 0.3: {1: 15, 2: 15}})
    assert (choice.value, choice.remark) == (0.2, "")
    first = Choice("b", KEY, {0.1: {1: 5.0}, 0.2: {1: 5.0}})
    assert (first.value, first.remark) == (0.1, "at the edge: the smallest value is the best one")
    (row, _) = choices_table([choice, choice]).rows
    assert [cell_text(cell, 1) for cell in row] == [
        *("a", "10.0 \u00b1 0.0", "15.0 \u00b1 7.1 (chosen)", "15.0 \u00b1 0.0", "0.2", "")
    ]


@pytest.mark.parametrize(
    ("key", "of_arm", "overrides"),
    [
        (KEY, (KEY, "1"), []),
        (KEY, (), [KEY, "1"]),
        ("SEED", (), []),
        ("SOLVER.MAX_ITER", (), []),
    ],
)
def test_a_key_that_is_set_elsewhere_is_refused(
    key: str, of_arm: tuple[str, ...], overrides: list[str], tmp_path: Path
) -> None:
    candidates = Candidates(key, (1, 2), (100,))
    study = Study("", (Arm("a", DETR, of_arm),), {}, iterations=5, choose=candidates)
    with pytest.raises(ValueError, match=f"choose: key is {key}, which the study"):
        plan_choosing(study, tmp_path, overrides)
    assert not [*tmp_path.iterdir()]


def test_the_runs_of_a_choice_have_their_value_and_one_evaluation(tmp_path: Path) -> None:
    study = Study("", (Arm("a", DETR),), {}, iterations=6, evaluations=3, choose=CANDIDATES)
    runs = plan_choosing(study, tmp_path)
    assert [run.name for run in runs] == [
        f"a {value}/seed_{seed}" for seed in (100, 101) for value in (0.1, 0.2, 0.3)
    ]
    cfg = setup_config(DETR, runs[1].options)
    assert (cfg.SOLVER.BASE_LR, cfg.SEED, cfg.TEST.EVAL_PERIOD) == (0.2, 100, 6)


@pytest.mark.slow
def test_a_stop_while_the_arms_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stand-ins for trainings: AP 10 at the rates 0.1 and 0.2, but one run at 0.2 diverges before
    its first record, and AP 9 at 0.3."""
    (tmp_path / "study.yaml").write_text(
        f"iterations: 200\nseeds: 1\narms: {{a: {{config: {DETR}}}}}\n"
        f"choose: {{key: {KEY}, values: [0.3, 0.1, 0.2], seeds: [100, 101]}}\n"
    )
    started: list[str] = []

    def start(run: StudyRun, threads: int) -> subprocess.Popen[bytes]:
        if len(started) == 3:
            started.append("stop")
            raise KeyboardInterrupt
        rate = setup_config(DETR, run.options).SOLVER.BASE_LR
        started.append(run.name)
        if (rate, run.seed) == (0.2, 101):
            run.path.mkdir(parents=True)
            (run.path / "finished.json").write_text('{"error": "the loss is not finite"}')
        else:
            write_run(run.path, [1, 9 if rate == 0.3 else 10], seed=run.seed)
        return subprocess.Popen(["true"])

    monkeypatch.setattr(runs_module, "_start", start)
    monkeypatch.setattr(runs_module, "_POLL", 0.02)
    output = tmp_path / "out"
    command = ["compare", "--study", str(tmp_path / "study.yaml"), "--output", str(output)]
    assert main(command) == 130
    assert "run the same command" in capsys.readouterr().err
    assert not (output / "a").exists()
    assert main(command) == 0
    assert started.pop(3) == "stop"
    assert started == [
        *(f"a {rate}/seed_{seed}" for seed in (100, 101) for rate in (0.1, 0.2, 0.3)),
        "a/seed_0",
    ]
    choice = json.loads((output / "a" / "choice.json").read_text())
    assert choice["value"] == 0.1
    assert choice["AP"]["0.2"] == {"100": 10, "101": 0}
    content: dict[str, Any] = json.loads((output / "report.json").read_text())
    (table,) = [t for s in content["sections"] for t in s["tables"] if t["key"] == "choice"]
    assert table["rows"][0][-1].startswith("at the edge: the smallest")
    assert "10.00 \u00b1 0.00 (chosen)" in (output / "report.html").read_text()
    assert "Choice,choice,a,chosen,0.1" in (output / "report.csv").read_text()
    arm = (output / "a" / "arm.yaml").read_text()
    assert "BASE_LR: 0.1\n" in arm


@pytest.mark.slow
def test_the_study_of_controls(tmp_path: Path) -> None:
    """Six arms at two depths, five rates on two seeds, then eight seeds."""
    study = read_study(ROOT / "configs/studies/controls.yaml")
    assert study.choose is not None
    assert (len(study.choose.values), study.choose.seeds) == (5, (100, 101))
    assert {arm.seeds for arm in study.arms} == {tuple(range(8))}
    runs = plan_runs(study, tmp_path)
    configs = {run.arm.name: setup_config(run.arm.config_file, run.options) for run in runs}
    kinds = {
        (
            cfg.MODEL.DETR.ENC_LAYERS,
            cfg.MODEL.DETR.LAYER_RESIDUAL,
            cfg.MODEL.DETR.LAYER_RESIDUAL_IN,
            cfg.MODEL.DETR.PRE_NORM,
            cfg.SOLVER.WARMUP_ITERS > 200,
        )
        for cfg in configs.values()
    }
    assert kinds == {
        (depth, *kind)
        for depth in (6, 12)
        for kind in (
            ("none", "both", False, False),
            ("none", "both", True, False),
            ("none", "both", False, True),
            ("before_norm", "both", False, False),
            ("before_norm", "both", True, False),
            ("before_norm", "encoder", False, False),
        )
    }
    assert {name for group in study.groups.values() for name in group} == set(configs)
