"""``miti-detr attention`` from end to end, on a small model with random weights."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.cli.main import main
from tests.helpers import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attention")
    for placement in ("none", "before_norm"):
        cfg = tiny_config("MODEL.DETR.LAYER_RESIDUAL", placement, "MODEL.DETR.DEC_LAYERS", 2)
        torch.manual_seed(0)
        output = folder / placement
        MitiDetrCheckpointer(build_model(cfg), str(output), cfg=cfg).save("model_final")
    Image.effect_noise((56, 40), 90).convert("RGB").save(folder / "photo.jpg")
    return folder


def test_two_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--queries", "1", "--pixel", "10,12.5", "--pixel", "0,39", "--output", str(tmp_path)]
    for placement in ("none", "before_norm"):
        words += ["--weights", str(folder / placement / "model_final.pth")]
    assert main(["attention", str(folder / "photo.jpg"), *words]) == 0
    names = ["decoder", "decoder_1", "encoder", "encoder_1", "encoder_2"]
    files = [tmp_path / f"photo_{name}.png" for name in names]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert all(file.is_file() for file in files)


def test_wrong_pixels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = str(folder / "none" / "model_final.pth")
    words = [str(folder / "photo.jpg"), "--weights", weights, "--output", str(tmp_path)]
    assert main(["attention", *words, "--pixel", "56,0"]) == 1
    assert "pixel 56,0 is outside the image of 56 x 40" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["attention", *words, "--pixel", "56x0"])
    assert "'56x0' is not a position X,Y" in capsys.readouterr().err
