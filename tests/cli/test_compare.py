"""``miti-detr compare`` from end to end."""

import csv
import json
from pathlib import Path

import pytest

from miti_detr.cli.main import Terminated, main
from miti_detr.engine import setup_config
from tests.engine.hooks.test_matching import SMALL
from tests.helpers import ROOT
from tests.small_shapes import small_shapes
from tests.study.made_runs import write_foreign_run, write_run

Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_from_runs(tmp_path: Path, capsys: Capture) -> None:
    paths = [write_run(tmp_path / "ours", [10, 20]), write_foreign_run(tmp_path / "theirs")]
    output = tmp_path / "out"
    words = ["--output", str(output), "--ap", "15", "--threshold", "0.3"]
    assert main(["compare", "--from", *map(str, paths), *words]) == 0
    assert capsys.readouterr().out == f"{output / 'report.html'}\n"
    content = json.loads((output / "report.json").read_text())
    assert content["threshold"] == 0.3
    (reached,) = [t for t in content["sections"][0]["tables"] if t["key"] == "reached"]
    assert reached["columns"] == ["model", "AP 15"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "gone"], "is this the output folder of a run?"),
        (["--study", "gone.yaml"], "gone.yaml"),
        (["--from", "run", "SOLVER.BASE_LR", "1"], "remove the KEY VALUE pairs"),
        (["--config-file", "gone.yaml"], "the config file gone.yaml does not exist"),
    ],
)
def test_bad_input_is_named(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert message in line


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_a_stopped_study_says_how_to_continue(
    stop: BaseException,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def run_study(*args: object, **kwargs: object) -> list[str]:
        raise stop

    monkeypatch.setattr("miti_detr.study.runs.run_study", run_study)
    command = ["compare", "--config-file", str(ROOT / "configs/shapes/detr.yaml")]
    command += ["--output", str(tmp_path / "my study")]
    monkeypatch.setattr("sys.argv", ["miti-detr", *command])
    assert main(command) == status
    error = capsys.readouterr().err
    assert "stopped. To continue, run the same command:\nmiti-detr compare" in error
    assert "/my study'\n" in error


@pytest.mark.slow
def test_train_and_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Two arms train in two processes; repeating the command trains nothing, and another config is
    refused."""
    output = tmp_path / "out"
    configs = [str(ROOT / f"configs/shapes/{name}.yaml") for name in ("detr", "miti_detr")]
    settings = ["--iterations", "4", "--evaluations", "2", "--seeds", "1", "--jobs", "2"]
    overrides = [str(word) for pair in SMALL.items() for word in pair]
    command = ["compare", "--config-file", *configs, *overrides, *settings, "--output", str(output)]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))  # for the processes
    with small_shapes(tmp_path):
        assert main(command) == 0
        printed = capsys.readouterr()
        assert "2/2 runs" in printed.err
        consoles = [path.read_text() for path in output.rglob("console.txt")]
        assert len(consoles) == 2
        assert main(command) == 0
        assert [path.read_text() for path in output.rglob("console.txt")] == consoles
        assert main([*command, "SOLVER.BASE_LR", "0.1"]) == 1
        assert "was started with SOLVER.BASE_LR 0.001" in capsys.readouterr().err

    content = json.loads((output / "report.json").read_text())
    assert content["missing"] == []
    tables = {table["key"]: table["rows"] for table in content["sections"][0]["tables"]}
    assert set(tables) >= {"accuracy", "differences", "efficiency", "stability", "matching"}
    names, seconds, images, parameters, _ = zip(*tables["efficiency"], strict=True)
    assert names == ("detr", "miti_detr")
    assert images == (4, 4)
    assert parameters[0] == parameters[1] > 1000
    assert all(cell["mean"] > 0 for cell in seconds)
    weights = [row[3] for row in content["runs"]["rows"]]
    assert weights[0] == weights[1] != ""
    assert len(content["pictures"]) == 4
    runs = [r for r in csv.DictReader((output / "report.csv").open()) if r["table"] == "runs"]
    assert {r["row"] for r in runs} == {"detr/seed_0", "miti_detr/seed_0"}
    cfg = setup_config(str(output / "detr" / "seed_0" / "config.yaml"))
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SEED) == (4, 2, 0)
