"""The command line itself: help, usage, errors, signals and streams."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miti_detr import streams
from miti_detr.cli import main as main_module
from miti_detr.cli.arguments import fraction, positive_int, split_overrides
from miti_detr.cli.main import COMMANDS, main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    words = capsys.readouterr().out.split()
    assert set(COMMANDS) <= set(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"miti-detr {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["curves"], ["curves", "run", "--fast"], ["doctor", "SEED", "1"]]
)
def test_wrong_usage_leaves_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: miti-detr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\n  b"), "miti-detr: error: a b"),
        (KeyError("Non-existent config key: X"), "miti-detr: error: Non-existent config key: X"),
        (FileNotFoundError(2, "No such file", "x.png"), "miti-detr: error: No such file: x.png"),
        (FileNotFoundError("no run"), "miti-detr: error: no run"),
        (ImportError("needs timm"), "miti-detr: error: needs timm"),
        (ValueError(), "miti-detr: error: ValueError"),
    ],
)
def test_expected_errors_are_one_line(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(error, monkeypatch)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == line + "\n"
    with pytest.raises(type(error)):
        main(["--traceback", "doctor"])


def test_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(RuntimeError("a fault"), monkeypatch)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["doctor"])


def test_an_interrupt_leaves_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(["doctor"]) == 130


def test_sigterm_leaves_with_143(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("miti_detr.cli.doctor.run", run)
    assert main(["doctor"]) == 143
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    build = main_module.build_parser
    monkeypatch.setattr("miti_detr.cli.doctor.run", run)
    assert build().parse_args(["doctor"]).func is run


def test_overrides_are_told_from_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("TEST.PNG").touch()
    words = ["a.JPG", "A.PNG", "TEST.PNG", "MODEL.DEVICE", "cpu", "TEST.X", "1"]
    assert split_overrides(words) == (words[:3], words[3:])
    assert split_overrides(["a"]) == (["a"], [])


@pytest.mark.parametrize(("read", "text"), [(fraction, "1.5"), (positive_int, "0")])
def test_numbers_out_of_range(read: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text.replace(".", r"\.")):
        read(text)  # type: ignore[operator]


# Prints 100,000 lines with a character that ASCII lacks. It imports only one module, to be quick.
PRINT = f"""
import logging, runpy, sys
streams = runpy.run_path({str(Path(streams.__file__))!r})
streams["prepare_streams"]()
sys.stdout.isatty()
try:
    print("\\u00b1 1\\n" * 100_000)
    logging.error("the end")
    sys.stdout.flush()
except BrokenPipeError:
    logging.error("the reader has gone")
    streams["discard_output"]()
    sys.exit(141)
"""


@pytest.mark.parametrize(
    ("shell", "status", "output"),
    [
        ('"$@" >&-', 0, ""),
        ('"$@" 2>&- >&-', 0, ""),
        ('"$@" | head -n 1; exit ${PIPESTATUS[0]}', 141, "\u00b1 1\n"),
        ('"$@" 2>&1 | head -n 1; exit ${PIPESTATUS[0]}', 141, "\u00b1 1\n"),
        ('LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 "$@" | tail -n 2', 0, "? 1\n\n"),
    ],
)
def test_any_standard_output_will_do(shell: str, status: int, output: str) -> None:
    """It may be closed, a pipe without a reader, or have an encoding that lacks a character."""
    environment = {**os.environ, "PYTHONIOENCODING": "", "PYTHONUTF8": "1"}
    command = ["bash", "-c", shell, "bash", sys.executable, "-c", PRINT]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=60
    )
    assert (done.returncode, done.stdout) == (status, output)
    assert "Error" not in done.stderr


def test_a_broken_pipe_leaves_with_141(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(BrokenPipeError(), monkeypatch)
    assert main(["doctor"]) == 141


@pytest.mark.slow
def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "miti_detr.cli", "curves", str(tmp_path / "gone")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("miti-detr: error: no ")
    assert "Traceback" not in done.stderr
