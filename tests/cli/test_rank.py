"""``miti-detr rank`` from end to end, on small models with random weights."""

import functools
import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.cli.main import main
from miti_detr.rank import measure_rank, theory
from miti_detr.rank.models import model_names
from tests.helpers import ROOT, tiny_config

Capture = pytest.CaptureFixture[str]
SMALL = [
    *("MODEL.DETR.HIDDEN_DIM", "32", "MODEL.DETR.NHEADS", "2"),
    *("MODEL.DETR.DIM_FEEDFORWARD", "64", "MODEL.DETR.DEC_LAYERS", "2"),
]
CONFIGS = [str(ROOT / f"configs/shapes/{name}.yaml") for name in ("detr", "miti_detr")]


@pytest.mark.slow
def test_random_initialisation_side_by_side(tmp_path: Path, capsys: Capture) -> None:
    """DETR and Miti-DETR with the same random weights agree in layer 0 but not in layer 2."""
    words = [word for config in CONFIGS for word in ("--config-file", config)]
    assert main(["rank", *words, "--output", str(tmp_path), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    record = json.loads((tmp_path / "rank.json").read_text())
    detr, miti = record["models"]
    assert (detr["name"], miti["name"]) == ("detr", "miti_detr")
    assert detr["weights"] == "random, seed 0"
    assert list(detr["stacks"]) == ["encoder", "decoder", "decoder, normalised"]
    assert detr["stacks"]["encoder"][0] == miti["stacks"]["encoder"][0]
    first, second = (m["stacks"]["encoder"][2]["residual"] for m in (detr, miti))
    assert all(a < b for a, b in zip(first, second, strict=True))
    assert detr["stacks"]["decoder"][0]["residual"] == [None, None]  # the states start at zero
    with Image.open(tmp_path / "rank.png") as picture:
        assert picture.width > 800


@pytest.mark.slow
def test_weights_and_images(tmp_path: Path, capsys: Capture) -> None:
    """The values are those of the model on the image, resized as in evaluation."""
    cfg = tiny_config("MODEL.DETR.DEC_LAYERS", 1)
    torch.manual_seed(3)
    model = build_model(cfg)
    MitiDetrCheckpointer(model, str(tmp_path), cfg=cfg).save("model_final")
    Image.effect_noise((112, 80), 90).convert("RGB").save(tmp_path / "photo.png")
    weights = str(tmp_path / "model_final.pth")
    words = [str(tmp_path / "photo.png"), "--weights", weights, "--output", str(tmp_path)]
    assert main(["rank", *words]) == 0
    assert f"{tmp_path.name}: encoder" in capsys.readouterr().out
    record = json.loads((tmp_path / "rank.json").read_text())
    with Image.open(tmp_path / "photo.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = pixels.reshape(80, 112, 3).permute(2, 0, 1)
    expected = measure_rank(model, [{"image": image}])["encoder"][2]["residual"][0]
    found = record["models"][0]["stacks"]["encoder"][2]["residual"]
    assert found == [pytest.approx(expected, rel=1e-4)]


def test_theory(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(
        theory.TheorySpec, grid=(3, 4), d_model=16, nhead=2, dim_feedforward=16, depth=6
    )
    monkeypatch.setattr(theory, "TheorySpec", small)
    assert main(["rank", "--theory", "--seeds", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.startswith((tmp_path / "rank_theory.txt").read_text().rstrip())
    record = json.loads((tmp_path / "rank_theory.json").read_text())
    assert len(record["panels"]["encoder, shared"]["before_norm"]) == 7
    assert len(record["pure"]) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --weights, or --config-file"),
        (["--theory", "--weights", "w.pth"], "--theory takes no model"),
        (["--weights", "w", *["--config-file", "c"] * 2], "2 config files for 1 weights"),
    ],
)
def test_wrong_use(words: list[str], message: str, capsys: Capture) -> None:
    assert main(["rank", *words]) == 1
    assert message in capsys.readouterr().err


def test_models_are_named_by_what_differs() -> None:
    assert model_names(["out/detr/model_final.pth"]) == ["detr"]
    assert model_names(["a/run/model_final.pth", "b/run/model_final.pth"]) == ["a/run", "b/run"]
    assert model_names(["run/model_0.pth", "run/model_1.pth"]) == ["model_0", "model_1"]
    assert model_names(["c.yaml", "c.yaml"]) == ["c 1", "c 2"]
