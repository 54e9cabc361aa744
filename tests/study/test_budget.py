"""Studies with a time instead of a number of iterations, as ``make gpu-study`` runs one."""

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from miti_detr.cli.main import main
from miti_detr.study import budget
from miti_detr.study.plan import StudyRun, plan_runs
from miti_detr.study.study_file import read_study
from tests.engine.stub import write_data
from tests.helpers import ROOT
from tests.study.made_runs import write_lines
from tests.study.test_plan import train

GPU = ROOT / "configs/studies/gpu.yaml"
TOY: dict[str, Any] = {  # what needs a GPU, weights, or time
    "MODEL.DEVICE": "cpu",
    "MODEL.CUDA_GRAPHS": False,
    "MODEL.WEIGHTS": "",
    "MODEL.DETR.HIDDEN_DIM": 16,
    "MODEL.DETR.NHEADS": 2,
    "MODEL.DETR.DIM_FEEDFORWARD": 16,
    "MODEL.DETR.SIZE_DIVISIBILITY": 32,
    "MODEL.DETR.NUM_CLASSES": 2,
    "SOLVER.IMS_PER_BATCH": 2,
    "INPUT.MIN_SIZE_TRAIN": "(32,)",
    "INPUT.MIN_SIZE_TEST": 32,
    "INPUT.CROP.MIN_SIZE_BEFORE": "(32,)",
    "DATALOADER.NUM_WORKERS": 0,
    "DATASETS.TRAIN": "('toys',)",
    "DATASETS.TEST": "('toys_val',)",
}


def in_process(runs: Sequence[StudyRun], **_: Any) -> list[str]:
    for run in runs:
        if not (run.path / "finished.json").is_file():
            run.path.mkdir(parents=True, exist_ok=True)
            train(run)
    return []


@pytest.mark.slow
def test_the_study_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The arms, which differ in the layer residual only, get as many iterations as the trial of the
    first one says. A study that is continued repeats neither the trial nor the runs."""
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "not here")
    monkeypatch.setattr("miti_detr.study.runs.run_study", in_process)
    monkeypatch.setattr(budget, "run_study", in_process)
    monkeypatch.setattr(budget, "_TRIAL", 2)
    monkeypatch.setattr(budget, "_seconds_per_iteration", lambda path: 160.0)
    write_data(tmp_path / "data", num_images=4)
    data = [str(tmp_path / "data" / name) for name in ("data.json", "images")]
    words = ["DATASETS.COCO_FORMAT", str([["toys", *data], ["toys_val", *data]])]
    words += [str(word) for pair in TOY.items() for word in pair]
    output = tmp_path / "out"
    command = ["compare", "--study", str(GPU), "--evaluations", "1", "--output", str(output)]
    assert main([*command, *words]) == 0
    assert "measuring how many iterations take 10 minutes" in capsys.readouterr().out
    content = json.loads((output / "report.json").read_text())
    assert content["missing"] == []
    assert {row[0]: row[2] for row in content["runs"]["rows"]} == {
        "detr/seed_0": 3,  # 80 % of 600 s
        "miti_detr/seed_0": 3,
    }
    assert content["runs"]["rows"][0][3] == content["runs"]["rows"][1][3]  # initial weights
    before = [path.stat().st_mtime_ns for path in output.rglob("metrics.json")]
    assert len(before) == 3
    assert main([*command, *words]) == 0
    assert [path.stat().st_mtime_ns for path in output.rglob("metrics.json")] == before


def test_seconds_per_iteration(tmp_path: Path) -> None:
    """The first record has the start of the run in it."""
    path = tmp_path / "metrics.json"
    times = [{"iteration": 19, "time": 9.0}, {"iteration": 39, "time": 2.0}]
    write_lines(path, [*times, {"iteration": 59, "time": 3.0}, {"iteration": 60, "bbox/AP": 1}])
    assert budget._seconds_per_iteration(path) == 2.5


def test_a_trial_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "run_study", lambda runs, **_: ["a/seed_0 ended with status 1"])
    study = dataclasses.replace(read_study(GPU), arms=read_study(GPU).arms[:1])
    cpu = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    with pytest.raises(ValueError, match="ended with status 1"):
        budget.with_iterations(study, tmp_path, cpu)


def test_iterations_go_before_minutes(tmp_path: Path) -> None:
    study = dataclasses.replace(read_study(GPU), iterations=20_000)
    assert budget.with_iterations(study, tmp_path) is study
    run, _ = plan_runs(study, tmp_path, ["MODEL.WEIGHTS", ""])
    options = dict(zip(run.options[::2], run.options[1::2], strict=True))
    assert options["SOLVER.MAX_ITER"] == "20000"
    assert options["SOLVER.CHECKPOINT_PERIOD"] == "400"  # 50 checkpoints


def test_the_target_of_make() -> None:
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "gpu-study",
        "PYTHON=python3",
        "ARGS=KEY \"['a']\"",
    ]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    line = made.replace("\\\n", " ")
    assert '--study "configs/studies/gpu.yaml" --jobs 1' in line
    assert line.rstrip().endswith("KEY \"['a']\"")
