import itertools

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import logger as detectron2_logger

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.pixels import CAFFE2, TORCHVISION, Pixels, expected_pixels
from tests.checkpoint.helpers import r50_config, slim
from tests.checkpoint.test_checkpointer import RESNET18

ZOO = "detectron2://ImageNetPretrained"
BGR = (
    *("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
    *("INPUT.FORMAT", "BGR"),
)


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(detectron2_logger, "_LOG_COUNTER", type(detectron2_logger._LOG_COUNTER)())


@pytest.mark.parametrize(
    ("path", "told", "expected"),
    [
        (f"{ZOO}/torchvision/R-50.pkl", {}, TORCHVISION),
        (f"{ZOO}/MSRA/R-101.pkl", {}, CAFFE2),
        (f"{ZOO}/FAIR/X-101-32x8d.pkl", {}, Pixels(CAFFE2.mean, (57.375, 57.12, 58.395), "BGR")),
        ("https://download.pytorch.org/models/resnet50-0676ba61.pth", {}, TORCHVISION),
        ("https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth", {}, TORCHVISION),
        ("weights/R-50.pkl", {"source": "detectron2_resnet"}, None),
        ("R.pkl", {"source": "detectron2_resnet", "author": "torchvision"}, TORCHVISION),
        ("R.pkl", {"author": "Caffe2"}, CAFFE2),
        ("w.pth", {"source": "torchvision_resnet"}, TORCHVISION),
        ("w.pth", {"source": "hf"}, TORCHVISION),
        ("w.pth", {"source": "ours"}, None),
        ("", {}, None),
    ],
)
def test_origins(path, told, expected):
    assert expected_pixels(path, **told) == expected


def config(name, *overrides):
    return r50_config(*RESNET18, "MODEL.WEIGHTS", f"{ZOO}/{name}", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "pixels"),
    list(itertools.product(["torchvision/R-18.pkl", "MSRA/R-50.pkl"], [(), BGR])),
)
def test_model_is_compared_with_the_name_of_its_weights(weights, pixels, caplog):
    """When it is built, so with anybody's trainer; each pair once."""
    for _ in range(2):
        build_model(config(weights, *pixels))
    fits = weights.startswith("MSRA") == bool(pixels)
    messages = [r.getMessage() for r in caplog.records if "was trained on" in r.getMessage()]
    assert len(messages) == (not fits)
    if messages:
        wanted = "123.675, 116.28, 103.53" if pixels else "103.53, 116.28, 123.675"
        order = "RGB" if pixels else "BGR"
        assert f"set MODEL.PIXEL_MEAN [{wanted}]" in messages[0]
        assert messages[0].endswith(f"INPUT.FORMAT {order}")


def test_channel_order_alone_is_enough(caplog):
    build_model(config("torchvision/R-18.pkl", "INPUT.FORMAT", "BGR"))
    assert "was trained on RGB images" in caplog.text
    assert "this model takes BGR images" in caplog.text


@pytest.mark.parametrize("pixels", [(), BGR])
def test_checkpointer_knows_by_the_content(pixels, tmp_path, caplog):
    """A name that tells nothing, keys that tell DETR."""
    model = build_model(r50_config(*RESNET18, *pixels))
    torch.save({"model": slim("detr_r50")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"shape|no key"):
        MitiDetrCheckpointer(model).load(str(tmp_path / "w.pth"))
    assert ("w.pth was trained on RGB images" in caplog.text) == bool(pixels)


def test_timm_weights_are_compared_with_their_own_record(monkeypatch, caplog):
    """test_resnet of timm takes mean and std 0.5 of [0, 1]; no download here."""
    timm = pytest.importorskip("timm")
    make = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: make(*a, **{**k, "pretrained": False})
    )
    options = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "test_resnet")
    build_model(r50_config(*RESNET18, *options, "MODEL.TIMM.PRETRAINED", True))
    assert "test_resnet of timm was trained on RGB images with mean [127.5," in caplog.text
