"""The commands from end to end, on a small model with random weights."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.cli import doctor
from miti_detr.cli.main import main
from tests.helpers import tiny_config
from tests.visualize.test_detections import register_images

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    cfg = tiny_config()
    torch.manual_seed(0)
    MitiDetrCheckpointer(build_model(cfg), str(folder), cfg=cfg).save("tiny")
    return str(folder / "tiny.pth")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for index in range(3):
        path = tmp_path / "images" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((40 + 10 * index, 50), 90).convert("RGB").save(path)
    return tmp_path / "images"


def test_predict(weights: str, images: Path, tmp_path: Path, capsys: Capture) -> None:
    (images / "broken.jpg").write_text("no image")
    out = tmp_path / "out"
    words = ["--weights", weights, "--output", str(out), "--threshold", "0", "--batch-size", "2"]
    assert main(["predict", str(images), *words]) == 3  # one of the files has failed
    printed = capsys.readouterr()
    assert "3 of 4 images, 21 detections" in printed.out  # 7 queries per image
    assert f"skipped {images / 'broken.jpg'}" in printed.err
    results = json.loads((out / "predictions.json").read_text())
    assert {result["category_id"] for result in results} <= {1, 2, 3}  # ids of the shapes
    assert sorted(path.name for path in out.glob("*.png")) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("first", [True, False])
def test_predict_takes_overrides(weights: str, images: Path, tmp_path: Path, first: bool) -> None:
    keys = ["DATASETS.TEST", "()", "TEST.DETECTIONS_PER_IMAGE", "5"]
    options = ["--weights", weights, "--output", str(tmp_path), "--threshold", "0"]
    tail = [*keys, *options] if first else [*options, *keys]
    assert main(["predict", str(images / "0.png"), *tail]) == 0
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert {result["category_id"] for result in results} <= {0, 1, 2}  # indices, without a data set


def test_predict_without_a_readable_image(weights: str, tmp_path: Path, capsys: Capture) -> None:
    words = ["predict", str(tmp_path / "gone.png"), "--weights", weights]
    assert main([*words, "--output", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert "gone.png" in printed.err
    assert "0 of 1 images" in printed.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.DETR.LAYERS", "6"], "unknown config key MODEL.DETR.LAYERS"),
        (["MODEL.DEVICE"], "'MODEL.DEVICE' has no value"),
        (["--config-file", "gone.yaml"], "gone.yaml"),
        (["--weights", "gone.pth"], "gone.pth"),
    ],
)
def test_predict_names_bad_input(
    weights: str, images: Path, words: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    options = ["--weights", weights, "--output", str(tmp_path / "out")]
    assert main(["predict", str(images), *options, *words]) == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("miti-detr: error: ")
    assert message in printed[0]


def test_detections(weights: str, tmp_path: Path, capsys: Capture) -> None:
    name = register_images(tmp_path, 3)
    out = tmp_path / "detections.png"
    options = ["--weights", weights, "--dataset", name, "--images", "2", "--output", str(out)]
    assert main(["detections", *options, "INPUT.MIN_SIZE_TEST", "32"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert Image.open(out).width > 1000


def test_detections_without_a_data_set(weights: str, tmp_path: Path, capsys: Capture) -> None:
    options = ["--weights", weights, "--output", str(tmp_path / "out.png")]
    assert main(["detections", *options, "DATASETS.TEST", "()"]) == 1
    assert "--dataset" in capsys.readouterr().err


def test_curves_go_into_the_run(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    assert main(["curves", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    assert (
        main(
            [
                "curves",
                str(tmp_path / "metrics.json"),
                str(tmp_path),
                "--output",
                str(tmp_path / "both.png"),
            ]
        )
        == 0
    )
    assert {path.name for path in tmp_path.glob("*.png")} == {"curves.png", "both.png"}


def test_replay_of_another_file_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    torch.save({"a": 1}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_bytes(b"hello")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({"a": {1}}))
    (tmp_path / "empty.pth").touch()
    for path in tmp_path.iterdir():
        assert main(["replay", str(path)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{path.name} is not a replay file" in line


def test_doctor(capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    report = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert report["torch"] == torch.__version__.partition("+")[0]
    assert "compiled operators" in report["detectron2"]
    assert "CPU" in report["devices"]


def test_doctor_says_how_to_get_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "MISSING: pip install torch" in printed
    assert "pip install --no-build-isolation git+" in printed
    assert "pip install 'miti_detr[timm]'" in printed
