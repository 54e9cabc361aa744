import json
import os

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.checkpoint import (
    CheckpointError,
    MitiDetrCheckpointer,
    convert_state_dict,
    to_hf,
    to_official,
)
from miti_detr.checkpoint.export import convert_file
from tests.checkpoint.helpers import assert_same, hollow, r50_config
from tests.checkpoint.test_checkpointer import RESNET18
from tests.fill import filled, image

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")
SIZES = ((160, 224), (192, 128))


def huggingface_inputs(model, images):
    """The same padded batch in Hugging Face's form: mask 1 = image."""
    batch = model.preprocess_image(images)
    mask = torch.zeros(len(images), *batch.tensor.shape[-2:], dtype=torch.int64)
    for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
        row[:height, :width] = 1
    return {"pixel_values": batch.tensor, "pixel_mask": mask}


def load(folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    model, info = transformers.DetrForObjectDetection.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval()


@pytest.mark.slow
@torch.no_grad()
def test_official_weights_equal_huggingface(tmp_path):
    """Published R50 keys, 6 + 6 layers: our converter and model against an independent model.

    Both read the same official file; Hugging Face's through the file that we write for it.
    """
    official = filled(hollow("detr_r50"))
    torch.save({"model": official}, tmp_path / "official.pth")
    model = build_model(
        r50_config("MODEL.DEVICE", "cpu", "MODEL.DETR.PADDING_MASK", "nearest")
    ).eval()
    MitiDetrCheckpointer(model).load(str(tmp_path / "official.pth"))
    convert_file(str(tmp_path / "official.pth"), str(tmp_path / "hf"), "hf")
    theirs = load(tmp_path / "hf")
    images = [{"image": image(f"image:{i}", *size)} for i, size in enumerate(SIZES)]
    ours = model.predict(images)
    expected = theirs(**huggingface_inputs(model, images))
    torch.testing.assert_close(ours.logits[-1], expected.logits, rtol=0, atol=2e-4)
    torch.testing.assert_close(ours.boxes[-1], expected.pred_boxes, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("saved_by", ["us", "them"])
def test_folder_loads_into_our_model(saved_by, tmp_path):
    """The folder that we write, and the one that ``save_pretrained`` makes of it."""
    overrides = ("MODEL.DETR.POSITION_EMBEDDING", "learned", "MODEL.DETR.NHEADS", 4)
    model, other = (build_model(r50_config(*RESNET18, *overrides)) for _ in range(2))
    cfg = r50_config(*RESNET18, *overrides)
    MitiDetrCheckpointer(model, str(tmp_path), cfg=cfg).save("model")
    folder = str(tmp_path / "hf")
    convert_file(str(tmp_path / "model.pth"), folder, "hf")
    if saved_by == "them":
        theirs = load(folder)
        assert theirs.config.encoder_attention_heads == 4
        assert theirs.config.id2label[0] == "person"
        folder = str(tmp_path / "saved")
        theirs.save_pretrained(folder)
    MitiDetrCheckpointer(other).load(folder)
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("backbone", ["timm", "native"])
def test_keys_of_the_installed_release(backbone):
    """The module names of today's ``transformers`` in memory, on the meta device."""
    config = {"encoder_layers": 1, "decoder_layers": 1, "num_labels": 80}
    if backbone == "native":
        config["backbone_config"] = transformers.ResNetConfig(out_features=["stage4"])
    with torch.device("meta"):
        theirs = transformers.DetrForObjectDetection(transformers.DetrConfig(**config))
    model = build_model(
        r50_config(
            *("MODEL.DEVICE", "meta"), *("MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1)
        )
    )
    weights = {k: torch.zeros(()).expand(v.shape) for k, v in theirs.state_dict().items()}
    state, report = convert_state_dict(weights, num_classes=80)
    assert report.dropped == ()
    model.load_state_dict(state, strict=True, assign=True)


def test_export_needs_what_huggingface_has():
    model = build_model(r50_config("MODEL.DEVICE", "meta", "MODEL.DETR.PRE_NORM", True))
    with pytest.raises(CheckpointError, match="these weights are pre-norm"):
        to_hf(model.state_dict())
    state = dict(build_model(r50_config(*RESNET18)).state_dict())
    with pytest.raises(ValueError, match="2 class names for 80 classes"):
        to_hf(state, class_names=["a", "b"])
    narrow = build_model(r50_config(*RESNET18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32)).state_dict()
    with pytest.raises(CheckpointError, match=r"usual width.* 64 channels first and 256 last"):
        to_hf(narrow)
    state = {k: v for k, v in state.items() if "body.res4.1" not in k}
    with pytest.raises(CheckpointError, match=r"needs a ResNet .* are \(2, 2, 1, 2\)"):
        to_hf(state)


def test_config_says_what_the_weights_cannot():
    state = build_model(r50_config("MODEL.DEVICE", "meta")).state_dict()
    _, config = to_hf(state, nhead=4, dilation=True)
    assert config["backbone"] == "resnet50"
    assert config["dilation"] is True
    assert config["decoder_attention_heads"] == 4
    assert (config["encoder_layers"], config["encoder_ffn_dim"]) == (6, 2048)
    assert json.loads(json.dumps(config))["id2label"]["79"] == "LABEL_79"


def test_official_export_matches_the_published_shapes():
    state = build_model(r50_config("MODEL.DEVICE", "cpu")).state_dict()
    shapes = {key: tuple(value.shape) for key, value in to_official(state).items()}
    assert shapes == {key: tuple(value.shape) for key, value in hollow("detr_r50").items()}
