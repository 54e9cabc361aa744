import runpy
import sys
from pathlib import Path

import pytest

import train_net

SCRIPT = Path(train_net.__file__)


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Run the script as Python does; its exit code."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return stop.value.code


def test_help_has_the_arguments_of_detectron2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    names = ("config-file", "num-gpus", "num-machines", "machine-rank", "dist-url", "resume")
    assert all(f"--{name}" in text for name in (*names, "eval-only"))


def test_wrong_key_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITERS", "3") == 1
    assert capsys.readouterr().err == (
        "error: unknown config key SOLVER.MAX_ITERS; did you mean SOLVER.MAX_ITER?\n"
    )


def test_train_net_stays_short() -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 100
