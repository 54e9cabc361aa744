"""Weights with a mask head: official, of the Detectron2 wrapper, of Hugging Face; both ways."""

import os

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.checkpoint import (
    CheckpointError,
    MitiDetrCheckpointer,
    convert_state_dict,
    to_d2_wrapper,
    to_hf,
    to_official,
)
from miti_detr.checkpoint.class_head import COCO_IDS
from miti_detr.checkpoint.export import convert_file
from tests.checkpoint.helpers import assert_same, hollow, r50_config, slim, tiny_model
from tests.checkpoint.test_huggingface import huggingface_inputs
from tests.fill import filled, image
from tests.modeling.segmentation.helpers import MASKS, mask_model

PYRAMID = ("MODEL.MASK_ON", True, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"])
MASK_KEYS = ("bbox_attention.", "mask_head.")


def test_official_weights_load_into_a_model():
    """All 490 published tensors; the head of 250 ids becomes the 133 classes of Detectron2."""
    model = build_model(r50_config(*PYRAMID, "MODEL.DEVICE", "meta", "MODEL.DETR.NUM_CLASSES", 133))
    weights = hollow("detr_panoptic")
    state, report = convert_state_dict(weights, num_classes=133, masks=True)
    assert report.dropped == report.reinitialised == ()
    assert report.notes == ("class head: 251 -> 134 rows by COCO id",)
    model.load_state_dict(state, strict=True, assign=True)


def test_panoptic_classes_are_those_of_detectron2():
    """Bias = id: class 0 is person (1), 80 the first stuff (banner, 92), 132 rug-merged (200)."""
    weights = slim("detr_panoptic")
    weights["detr.class_embed.bias"] = torch.arange(251.0)
    state, _ = convert_state_dict(weights, num_classes=None)
    assert state["class_embed.bias"][[0, 79, 80, 132, 133]].tolist() == [1, 90, 92, 200, 250]
    kept, _ = convert_state_dict(weights, num_classes=250)
    assert kept["class_embed.bias"].tolist() == list(range(251))


@pytest.mark.parametrize("num_classes", [None, 133, 250])
def test_official_keys_and_back(num_classes):
    weights = slim("detr_panoptic")
    keep = 250 if num_classes == 250 else None
    state, _ = convert_state_dict(weights, num_classes=keep, masks=True)
    back = to_official(state, num_classes=num_classes)
    heads = [f"detr.class_embed.{p}" for p in ("weight", "bias")]
    assert len(back[heads[0]]) == {None: 251, 133: 134, 250: 251}[num_classes]
    rows = [*COCO_IDS[133][1], 250]
    for key in heads:
        ours = back.pop(key)
        ours = ours if num_classes == 133 else ours[rows]
        assert torch.equal(ours, weights.pop(key)[rows])
    assert_same(back, weights)


def test_wrapper_keys_and_back():
    state, _ = convert_state_dict(slim("detr_panoptic"), num_classes=None, masks=True)
    wrapper = to_d2_wrapper(state)
    assert "detr.detr.query_embed.weight" in wrapper
    assert "detr.mask_head.lay1.weight" in wrapper
    back, report = convert_state_dict(wrapper, num_classes=133, masks=True)
    assert report.source == "d2_wrapper_panoptic"
    assert_same(back, state)


def test_a_detector_takes_weights_with_masks(tmp_path):
    """Everything but the mask head, whoever saved it."""
    masked = mask_model()
    MitiDetrCheckpointer(masked, str(tmp_path)).save("masked")
    detector = tiny_model(1, "MODEL.RESNETS.OUT_FEATURES", ["res3"])
    MitiDetrCheckpointer(detector).load(str(tmp_path / "masked.pth"))
    expected = {k: v for k, v in masked.state_dict().items() if not k.startswith(MASK_KEYS)}
    assert_same(detector.state_dict(), expected)


def test_masks_start_from_a_detector(tmp_path, caplog):
    """A joint training: the mask head keeps its own values, and Detectron2's log names it."""
    detector = tiny_model(1)
    MitiDetrCheckpointer(detector, str(tmp_path)).save("detector")
    masked = mask_model()
    before = {k: v.clone() for k, v in masked.state_dict().items()}
    MitiDetrCheckpointer(masked, for_training=True).load(str(tmp_path / "detector.pth"))
    for key, value in masked.state_dict().items():
        expected = before[key] if key.startswith(MASK_KEYS) else detector.state_dict()[key]
        assert torch.equal(value, expected)


def test_panoptic_record_is_compared(tmp_path):
    panoptic = ("MODEL.DETR.STUFF_CLASSES", [2])
    MitiDetrCheckpointer(mask_model(*panoptic), str(tmp_path)).save("model")
    MitiDetrCheckpointer(mask_model(*panoptic)).load(str(tmp_path / "model.pth"))
    with pytest.raises(CheckpointError, match=r"STUFF_CLASSES is \[\], the weights have \[2\]"):
        MitiDetrCheckpointer(mask_model()).load(str(tmp_path / "model.pth"))


SMALL = (
    *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.DETR.NHEADS", 8),
    *("MODEL.DETR.HIDDEN_DIM", 64, "MODEL.DETR.DIM_FEEDFORWARD", 96, "MODEL.DETR.ENC_LAYERS", 2),
    *("MODEL.DETR.DEC_LAYERS", 2, "MODEL.DETR.NUM_OBJECT_QUERIES", 9),
)


@pytest.mark.slow
@torch.no_grad()
def test_huggingface_has_the_same_masks(tmp_path):
    """Random weights with padding, through their file and back: logits, boxes and masks.

    With 64 channels the last convolutions of the mask head have 4, which Hugging Face normalises in
    4 groups like us. Absolute 2e-4 (logits), 2e-5 (boxes), 2e-4 (masks) in float32.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    os.environ["HF_HUB_OFFLINE"] = "1"
    cfg = r50_config(
        *(*PYRAMID, *SMALL, "MODEL.DEVICE", "cpu", "MODEL.DETR.PADDING_MASK", "nearest")
    )
    model, other = (build_model(cfg).eval() for _ in range(2))
    model.load_state_dict(filled(model.state_dict()))
    for linear in (model.bbox_attention.q_linear, model.bbox_attention.k_linear):
        linear.weight.mul_(4)
    model.mask_head.lay1.weight[:, 64:].mul_(64)  # or all queries have nearly the same mask
    MitiDetrCheckpointer(model, str(tmp_path), cfg=cfg).save("model")
    folder = str(tmp_path / "hf")
    convert_file(str(tmp_path / "model.pth"), folder, "hf")
    theirs, info = transformers.DetrForSegmentation.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    images = [
        {"image": image(f"image:{i}", *size)} for i, size in enumerate(((96, 128), (128, 70)))
    ]
    found = model.predict(images)
    expected = theirs.eval()(**huggingface_inputs(model, images))
    torch.testing.assert_close(found.logits[-1], expected.logits, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, rtol=0, atol=2e-5)
    assert expected.pred_masks.std(1).max() > 0.1  # queries differ
    torch.testing.assert_close(found.masks, expected.pred_masks, rtol=0, atol=2e-4)
    theirs.save_pretrained(tmp_path / "saved")
    for saved in (folder, str(tmp_path / "saved")):
        MitiDetrCheckpointer(other).load(saved)
        assert_same(other.state_dict(), model.state_dict())
        other.mask_head.out_lay.bias.add_(1)


def test_names_of_the_installed_release():
    """The modules of today's ``transformers`` in memory have other names than its files."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(out_features=[f"stage{i}" for i in (1, 2, 3, 4)])
    config = {"encoder_layers": 1, "decoder_layers": 1, "num_labels": 80}
    with torch.device("meta"):
        theirs = transformers.DetrForSegmentation(
            transformers.DetrConfig(**config, backbone_config=backbone)
        )
    layers = ("MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1)
    model = build_model(r50_config(*PYRAMID, *layers, "MODEL.DEVICE", "meta"))
    weights = {k: torch.zeros(()).expand(v.shape) for k, v in theirs.state_dict().items()}
    state, report = convert_state_dict(weights, num_classes=80, masks=True)
    assert (report.source, report.dropped) == ("hf_panoptic", ())
    model.load_state_dict(state, strict=True, assign=True)


def test_huggingface_needs_three_levels():
    state = build_model(
        r50_config(
            *(*SMALL, *MASKS[:2], "MODEL.DEVICE", "cpu"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
        )
    ).state_dict()
    with pytest.raises(CheckpointError, match="needs res2, res3 and res4 beside res5"):
        to_hf(state)
