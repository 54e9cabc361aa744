"""``miti-detr bench`` with a small model, measured in this process."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling as grow
from benchmarks import worker as child
from miti_detr.cli import bench
from miti_detr.cli.main import main
from tests.benchmarks.helpers import CONFIG, DETR, SMALL, InlineChild

Capture = pytest.CaptureFixture[str]
WORDS = ["--threads", "1", "--repeats", "1", "--size", "64x96"]
KEYS = [str(word) for word in SMALL]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "Child", InlineChild)
    monkeypatch.setattr(child, "PAUSE", 0)


def run(*words: str, config: str = CONFIG) -> int:
    return main(["bench", "--config-file", config, *WORDS, *words, *KEYS])


def test_against_the_plain_path(tmp_path: Path, capsys: Capture) -> None:
    tasks = ("--only", "inference,training", "--batch", "1")
    assert run("--against", "plain", *tasks, "--output", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "1 threads" in said
    assert said.count("x as fast (") == 6  # inference; step and its four parts
    assert "largest difference of logits" in said
    assert f"{tmp_path / 'bench.json'}" in said
    record = json.loads((tmp_path / "bench.json").read_text())
    assert list(record["results"]) == ["inference", "training"]
    assert record["results"]["inference"]["agreement"]["logits_max_difference"] <= 2e-4
    losses = record["results"]["training"]["agreement"]
    assert losses["losses_max_relative_difference"] <= 1e-4
    assert len(losses["losses"][0]) == 3
    assert record["results"]["training"]["weights"] == "random weights"
    assert (tmp_path / "steps.png").is_file()


def test_against_detr_nothing_but_cost_is_compared(capsys: Capture) -> None:
    assert run("--against", "detr", "--only", "inference", "--batch", "1") == 0
    said = capsys.readouterr().out
    assert "without the residual" in said
    assert "largest difference" not in said


def test_growth_and_its_chart(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grow, "OBJECTS", (2, 4))
    assert run("--grow", "objects", "--against", "plain", "--output", str(tmp_path)) == 0
    assert "plain path, 2 to 4 (2.00x): time" in capsys.readouterr().out
    assert (tmp_path / "grow_objects.png").is_file()


def test_paper(capsys: Capture, tmp_path: Path) -> None:
    words = ["--paper", "OUTPUT_DIR", str(tmp_path)]
    assert main(["bench", "--config-file", CONFIG, CONFIG, *words, *KEYS]) == 0
    said = capsys.readouterr().out
    assert "Miti-DETR R50 (paper)" in said
    assert said.count("no weights: ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "512"], "'512' is no height x width such as 512x672"),
        (["--size", "64x0"], "'64x0' is no height x width"),
        (["--only", "speed"], "'speed' is not one of model, inference, training, data"),
        (["--objects", "-1"], "-1 is not 0 or more"),
        (["--batch", "0"], "0 is not 1 or more"),
        (["--grow", "depth"], "invalid choice: 'depth'"),
        (["--limit", "--paper"], "not allowed with"),
    ],
)
def test_wrong_usage(words: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "hf"], "add MODEL.DETR.LAYER_RESIDUAL none"),
        (["--grow", "tokens", "--against", "detr"], "--grow measures against plain alone"),
        (["--limit", "--against", "plain"], "no --against"),
        (["--only", "model", "MODEL.DETR.DEPTH", "3"], "unknown config key MODEL.DETR.DEPTH"),
    ],
)
def test_what_does_not_fit_together(words: list[str], message: str, capsys: Capture) -> None:
    """The error is one line, before anything is measured."""
    assert run(*words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert message in said.err


def test_several_configs(capsys: Capture) -> None:
    assert main(["bench", "--config-file", CONFIG, CONFIG, *WORDS, *KEYS]) == 1
    assert "2 config files; several are for --paper alone" in capsys.readouterr().err
    assert run(config="gone.yaml") == 1
    assert "gone.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("busy", "warned"), [(0.0, False), (1.2, True)])
def test_work_of_others_is_said(
    busy: float, warned: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.meters.busy_cores", lambda: busy)
    assert busy < bench.BUSY or warned
    assert run("--only", "model", *[str(word) for word in DETR]) == 0
    said = capsys.readouterr().out
    assert ("Other work keeps 1.2 cores busy" in said) == warned
    assert "GFLOPs (multiply-adds), 64 x 96" in said
