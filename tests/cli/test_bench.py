"""``miti-detr bench`` with a small model."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.bench import machine
from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.cli import bench
from miti_detr.cli.main import main
from tests.helpers import threads, tiny_config

Capture = pytest.CaptureFixture[str]
WORDS = ["--threads", "1", "--repeats", "1", "--size", "64x96", "--batch", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(("busy", "warned"), [(0.0, False), (1.2, True)])
def test_a_trained_model(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, busy: float, warned: bool
) -> None:
    """The config is that of the checkpoint; work of others gives a warning."""
    cfg = tiny_config("MODEL.DEVICE", "cpu")
    MitiDetrCheckpointer(build_model(cfg), str(tmp_path), cfg=cfg).save("model")
    monkeypatch.setattr(machine, "busy_cores", lambda: busy)
    assert busy < bench.BUSY or warned
    with threads(torch.get_num_threads()):
        assert main(["bench", "--weights", str(tmp_path / "model.pth"), *WORDS]) == 0
    text = capsys.readouterr().out
    assert ", 1 threads, torch " in text
    assert "1 images of 64x96 per step" in text
    assert "training step" in text
    assert ("Other work uses 1.2 cores" in text) == warned
    if not warned:
        assert main(["bench", "--memory", "--weights", str(tmp_path / "model.pth"), *WORDS]) == 0
        assert "backbone: activations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "512"], "'512' is not height x width, such as 512x672"),
        (["--size", "64x0"], "'64x0' is not height x width"),
        (["--objects", "-1"], "-1 is not 0 or more"),
        (["--batch", "0"], "0 is not 1 or more"),
        (["--precision", "half"], "invalid choice: 'half'"),
    ],
)
def test_wrong_usage(words: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model was named. Add --config-file or --weights"),
        (["--config-file", "missing.yaml"], "missing.yaml"),
        (["--config-file", "missing.yaml", "MODEL.DETR.DEPTH", "3"], "missing.yaml"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: Capture) -> None:
    assert main(["bench", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err
