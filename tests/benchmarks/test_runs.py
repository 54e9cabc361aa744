"""``python -m benchmarks``: the list of runs, their records, and what happens to failures."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from benchmarks import __main__ as program
from benchmarks import runs as module
from benchmarks import scaling
from benchmarks.runs import KINDS, RECORD, Measurement, Run, measure, read_runs
from benchmarks.spec import bench_config
from tests.benchmarks.helpers import CONFIG, DETR, SMALL
from tests.helpers import ROOT

Capture = pytest.CaptureFixture[str]
LIST = ROOT / "benchmarks" / "runs.yaml"
KEYS = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
NO_RESIDUAL = dict(zip(DETR[::2], DETR[1::2], strict=True))


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"busy_cores_before": 1.2, "cores": 2}
    monkeypatch.setattr(program, "describe_machine", lambda: found)


def write_list(folder: Path, **runs: Any) -> Path:
    small = {"config": CONFIG, "sizes": [[64, 96]], "objects": 3, "repeats": 1, "batch": 1}
    path = folder / "runs.yaml"
    path.write_text(yaml.safe_dump({k: {**small, **v} for k, v in runs.items()}, sort_keys=False))
    return path


def run(path: Path, output: Path, *words: str) -> int:
    return program.main(["--runs", str(path), "--output", str(output), "--threads", "1", *words])


def test_the_list_of_the_project() -> None:
    """Every run has a config that its peer can have, and each kind occurs."""
    runs = read_runs(LIST, threads=2)
    assert {run.kind for run in runs} == set(KINDS)
    for run in runs:
        assert run.spec.threads == 2
        bench_config(run.spec, run.against or "ours")


@pytest.mark.slow
def test_runs_are_measured_once(tmp_path: Path, inline: None, capsys: Capture) -> None:
    """A failed run does not stop the others; complete runs are skipped the next time."""
    overrides = {**KEYS, **NO_RESIDUAL}
    path = write_list(
        tmp_path,
        steps={"kind": "training", "against": "plain", "overrides": overrides},
        size={"kind": "model", "overrides": overrides},
        broken={"kind": "inference", "overrides": {"MODEL.DETR.DEPTH": 3}},
    )
    assert run(path, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "broken: unknown config key MODEL.DETR.DEPTH" in captured.err
    assert "Other work uses 1.2 cores" in captured.out
    table = (tmp_path / "out/steps/table.txt").read_text()
    assert table in captured.out
    assert table.count("x as fast (") == 5  # the step and its four parts
    record = json.loads((tmp_path / "out/steps" / RECORD).read_text())
    assert record["run"]["against"] == "plain"
    assert record["machine"]["cores"] == 2
    assert record["result"]["agreement"]["losses_max_relative_difference"] <= 1e-4
    assert record["result"]["weights"] == "random weights"
    with Image.open(tmp_path / "out/steps/chart.png") as picture:
        picture.load()
    assert not (tmp_path / "out/broken").exists()

    assert run(path, tmp_path / "out", "steps", "size") == 0
    text = capsys.readouterr().out
    assert text.count("is complete") == 2
    assert run(path, tmp_path / "out", "--list") == 0
    assert capsys.readouterr().out.split("\n")[:3] == ["steps: done", "size: done", "broken: to do"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_its_record(
    kind: str, tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measurements have tests of their own; here each kind runs with the smallest one."""
    monkeypatch.setattr(scaling, "QUERIES", (2, 4))
    monkeypatch.setattr("benchmarks.roofline.MATRIX", 128)
    monkeypatch.setattr("benchmarks.roofline.COPY_MIB", 1)
    overrides = {**KEYS, "DATASETS.TRAIN": "('nowhere_train',)", "OUTPUT_DIR": str(tmp_path)}
    entry = {"kind": kind, "overrides": overrides, "images": 2, "variable": "queries"}
    assert run(write_list(tmp_path, only=entry), tmp_path / "out") == 0
    files = {file.name for file in (tmp_path / "out/only").iterdir()}
    drawn = kind in ("inference", "training", "scaling", "roofline")
    assert files == {"table.txt", RECORD, *(["chart.png"] if drawn else [])}
    assert json.loads((tmp_path / "out/only" / RECORD).read_text())["run"]["kind"] == kind


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "speed"}, "kind is 'speed'. Use one of model, inference"),
        ({"kind": "model", "against": "yolo"}, "against is 'yolo'. Use one of detr, plain, hf"),
        ({"kind": "model", "size": 3}, "unknown key size"),
        ({}, "kind or config is missing"),
    ],
)
def test_a_wrong_list_is_named(
    entry: dict[str, Any], message: str, tmp_path: Path, capsys: Capture
) -> None:
    path = write_list(tmp_path, first=entry)
    assert run(path, tmp_path / "out") == 1
    assert f"{path}, run first: {message}" in capsys.readouterr().err


def test_wrong_names_and_files(tmp_path: Path, capsys: Capture) -> None:
    path = write_list(tmp_path, first={"kind": "model"})
    assert run(path, tmp_path, "second") == 1
    assert "unknown run second" in capsys.readouterr().err
    assert run(tmp_path / "missing.yaml", tmp_path) == 1
    path.write_text("- a\n")
    assert run(path, tmp_path) == 1
    assert "is not a mapping" in capsys.readouterr().err


def test_faults_of_the_program_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail(run: Run) -> Measurement:
        raise RuntimeError("fault")

    monkeypatch.setitem(module._MEASURES, "model", fail)
    path = write_list(tmp_path, first={"kind": "model", "overrides": KEYS})
    assert run(path, tmp_path / "out") == 1
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="fault"):
        measure(read_runs(path, threads=1)[0])
