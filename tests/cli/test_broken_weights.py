"""Files without weights give one line and no traceback in every command that reads weights."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import train_net
from miti_detr.cli.main import main
from miti_detr.engine import run
from tests.checkpoint.test_files import BROKEN
from tests.helpers import ROOT
from tests.small_shapes import small_shapes

CONFIG = str(ROOT / "configs/shapes/miti_detr.yaml")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write all broken files, and a small data set for training."""
    folder = tmp_path_factory.mktemp("broken")
    for name, (write, _) in BROKEN.items():
        write(folder / name)
    Image.new("RGB", (32, 32)).save(folder / "photo.png")
    with small_shapes(tmp_path_factory.mktemp("data")):
        yield folder


def one_line(text: str, path: Path) -> None:
    errors = [line for line in text.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert str(path) in errors[0]
    assert "Traceback" not in text


@pytest.mark.parametrize("name", BROKEN)
def test_convert(
    name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(files / name), str(tmp_path / "out.pth"), "--to", "ours"]) == 1
    one_line(capsys.readouterr().err, files / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", [["--config-file", CONFIG], []])
@pytest.mark.parametrize("name", BROKEN)
def test_predict(
    name: str, config: list[str], files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--weights", str(files / name), "--output", str(tmp_path), "MODEL.DEVICE", "cpu"]
    assert main(["predict", str(files / "photo.png"), *config, *words]) == 1
    one_line(capsys.readouterr().err, files / name)


def test_predict_trusts_a_file_if_told(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This holds for commands that read the config from the file, too."""
    words = ["--weights", str(files / "module.pth"), "--output", str(tmp_path)]
    assert main(["predict", str(files / "photo.png"), *words, "MODEL.TRUST_WEIGHTS", "True"]) == 1
    assert "it holds a Linear, not weights by name" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("eval_only", [True, False])
@pytest.mark.parametrize("name", ["missing.pth", "cut.pth", "module.pth", "other.pth", "folder"])
def test_train_net(
    name: str,
    eval_only: bool,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    opts = ["MODEL.WEIGHTS", str(files / name), "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    args = argparse.Namespace(
        config_file=CONFIG, opts=opts, eval_only=eval_only, resume=False,
        num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto",
    )  # fmt: skip
    assert run(train_net.main, args) == 1
    one_line(capsys.readouterr().err, files / name)
