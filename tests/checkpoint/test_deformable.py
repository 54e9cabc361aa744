"""Weights of Deformable-DETR: published files of all kinds, Hugging Face, and our own."""

import os

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from miti_detr.checkpoint import (
    CheckpointError,
    MitiDetrCheckpointer,
    convert_state_dict,
    recognise,
    to_d2_wrapper,
    to_official,
)
from miti_detr.checkpoint.export import convert_file
from miti_detr.modeling.transformer import LAYER_RESIDUALS
from tests.checkpoint.helpers import assert_same, hollow, published, tiny_model
from tests.checkpoint.test_checkpointer import RESNET18
from tests.fill import image
from tests.helpers import build_on_meta, training_input
from tests.modeling.deformable.helpers import KINDS, coco_config, filled_once, tiny

SIZES = ((160, 224), (192, 128))
SMALL = (
    *RESNET18[2:],
    *("MODEL.DETR.ENC_LAYERS", 2, "MODEL.DETR.DEC_LAYERS", 2, "MODEL.DETR.HIDDEN_DIM", 64),
    *("MODEL.DETR.DIM_FEEDFORWARD", 64, "MODEL.DETR.NUM_OBJECT_QUERIES", 30),
)
INPUTS = [training_input((64, 96), [], [])]


def published_keys(kind):
    """Keys and shapes of the published files of 91 classes, from those of the base model."""
    base = {k: tuple(v.shape) for k, v in hollow("deformable_base").items()}
    if kind == "single_scale":
        more_levels = tuple(f"input_proj.{level}" for level in (1, 2, 3))
        base = {k: v for k, v in base.items() if not k.startswith(more_levels)}
        base["input_proj.0.0.weight"] = (256, 2048, 1, 1)
        base["transformer.level_embed"] = (1, 256)
        for key, shape in base.items():
            if "sampling_offsets" in key or "attention_weights" in key:
                base[key] = (shape[0] // 4, *shape[1:])
    if kind == "two_stage":
        for key in ("transformer.reference_points.weight", "transformer.reference_points.bias"):
            del base[key]
        del base["query_embed.weight"]
        for name, width in (("enc_output", 256), ("pos_trans", 512)):
            base[f"transformer.{name}.weight"] = (width, width)
            for key in (f"{name}.bias", f"{name}_norm.weight", f"{name}_norm.bias"):
                base[f"transformer.{key}"] = (width,)
        for key in [k for k in base if k.startswith(("class_embed.0", "bbox_embed.0"))]:
            base[key.replace(".0.", ".6.", 1)] = base[key]
    if kind in ("refine", "two_stage"):
        repeated = ("bbox_embed",) if kind == "refine" else ("bbox_embed", "class_embed")
        base |= {f"transformer.decoder.{k}": v for k, v in base.items() if k.startswith(repeated)}
    return base


def official(kind, *overrides):
    """A small published model of 91 classes, filled, and ours of the same weights."""
    cfg = coco_config(kind, *SMALL, "MODEL.DETR.NUM_CLASSES", 91, *overrides)
    model = build_model(cfg).eval()
    weights = filled_once(to_official(model.state_dict(), num_classes=91))
    state, _ = convert_state_dict(weights, num_classes=91)
    model.load_state_dict(state)
    return weights, model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_of_the_published_files(kind):
    state = build_on_meta(coco_config(kind, "MODEL.DETR.NUM_CLASSES", 91)).state_dict()
    found = {k: tuple(v.shape) for k, v in to_official(state, num_classes=91).items()}
    assert found == published_keys(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_official_and_back(kind):
    """91 rows become 80, without "no object"; tensors that the file has twice are there once."""
    weights, _ = official(kind)
    weights["transformer.total_ops"] = weights["total_params"] = torch.zeros(1)
    assert recognise(weights) == "deformable_detr"
    state, report = convert_state_dict(weights, num_classes=None)
    assert "class head: 91 -> 80 rows by COCO id" in report.summary()
    assert report.reinitialised == ()
    own = build_model(coco_config(kind, *SMALL)).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()}
    back = to_official(state)
    del weights["transformer.total_ops"], weights["total_params"]
    assert set(back) == set(weights)
    for key, value in weights.items():
        expected = value
        if "class_embed" in key:
            unused = [row for row in range(91) if row not in published()["rows_kept"]]
            expected = value.clone()
            expected[unused] = 0 if value.dim() > 1 else -1e4
        torch.testing.assert_close(back[key], expected, rtol=0, atol=0, msg=key)


def test_heads_that_should_be_one_and_differ_stay_apart():
    """A refined file whose decoder keys are missing; and one whose copies differ."""
    weights, _ = official("refine")
    cut = {k: v for k, v in weights.items() if "decoder.bbox_embed" not in k}
    state, _ = convert_state_dict(cut, num_classes=91)
    assert "bbox_embed.1.layers.0.weight" in state
    key = "transformer.decoder.bbox_embed.1.layers.2.bias"
    weights[key] = weights[key] + 1
    with pytest.raises(CheckpointError, match=r"two keys stand for bbox_embed\.1\.layers\.2\.bias"):
        convert_state_dict(weights, num_classes=91)


def test_file_is_read_as_model_weights(tmp_path, caplog):
    weights, model = official("base")
    torch.save({"model": weights}, tmp_path / "official.pth")
    same = build_model(coco_config("base", *SMALL, "MODEL.DETR.NUM_CLASSES", 91))
    with caplog.at_level("INFO"):
        MitiDetrCheckpointer(same, for_training=False).load(str(tmp_path / "official.pth"))
    assert "recognised official Deformable-DETR" in caplog.text
    assert_same(same.state_dict(), model.state_dict())


def test_wrong_architecture_is_named(tmp_path):
    weights, _ = official("base")
    torch.save({"model": weights}, tmp_path / "official.pth")
    with pytest.raises(CheckpointError, match="META_ARCHITECTURE DeformableDetr"):
        MitiDetrCheckpointer(tiny_model()).load(str(tmp_path / "official.pth"))
    torch.save({"model": dict(tiny_model().state_dict())}, tmp_path / "detr.pth")
    with pytest.raises(
        CheckpointError, match=r"not of a Deformable-DETR.*META_ARCHITECTURE MitiDe"
    ):
        MitiDetrCheckpointer(build_model(tiny())).load(str(tmp_path / "detr.pth"))
    ours, _ = convert_state_dict(weights, num_classes=91)
    with pytest.raises(CheckpointError, match="wrapper of DETR has no Deformable-DETR"):
        to_d2_wrapper(ours)


def test_stock_checkpointer_leaves_the_class_head_out(tmp_path):
    """As for DETR: inference before training is refused."""
    weights, _ = official("base")
    torch.save({"model": weights}, tmp_path / "official.pth")
    model = build_model(coco_config("base", *SMALL))
    DetectionCheckpointer(model).load(str(tmp_path / "official.pth"))
    with pytest.raises(CheckpointError, match="class head of these weights has another shape"):
        model.eval()(INPUTS)


@pytest.mark.parametrize("recorded", LAYER_RESIDUALS[:2])
def test_variant_is_recorded_and_checked(recorded, tmp_path):
    cfg = tiny("base", "MODEL.DETR.LAYER_RESIDUAL", recorded)
    MitiDetrCheckpointer(build_model(cfg), str(tmp_path), cfg=cfg).save("model")
    other = {"none": "before_norm", "before_norm": "none"}[recorded]
    model = build_model(tiny("base", "MODEL.DETR.LAYER_RESIDUAL", other))
    path = str(tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=f"LAYER_RESIDUAL is {other}"):
        MitiDetrCheckpointer(model, for_training=False).load(path)
    MitiDetrCheckpointer(build_model(cfg), for_training=False).load(path)


def test_class_loss_is_recorded_and_checked(tmp_path):
    """3 classes and "no object" have the shape of 4 classes."""
    cfg = tiny("base", "MODEL.DETR.CLASS_LOSS", "softmax", "MODEL.DETR.NUM_CLASSES", 3)
    MitiDetrCheckpointer(build_model(cfg), str(tmp_path), cfg=cfg).save("model")
    model = build_model(tiny("base", "MODEL.DETR.NUM_CLASSES", 4))
    with pytest.raises(CheckpointError, match="CLASS_LOSS is focal, the weights have softmax"):
        MitiDetrCheckpointer(model, for_training=False).load(str(tmp_path / "model.pth"))


transformers = pytest.importorskip("transformers")


def load_huggingface(folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    model, info = transformers.DeformableDetrForObjectDetection.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_official_weights_equal_huggingface_and_come_back(kind, tmp_path):
    """Padded batch: our model on the official file, theirs on the folder that we write of it.

    The folder that ``save_pretrained`` makes of theirs is loaded into our model again.
    """
    _, model = official(kind, "MODEL.DETR.PADDING_MASK", "nearest")
    cfg = coco_config(kind, *SMALL, "MODEL.DETR.NUM_CLASSES", 91)
    MitiDetrCheckpointer(model, str(tmp_path), cfg=cfg).save("ours")
    convert_file(str(tmp_path / "ours.pth"), str(tmp_path / "hf"), "hf")
    theirs = load_huggingface(tmp_path / "hf")
    images = [{"image": image(f"image:{i}", *size)} for i, size in enumerate(SIZES)]
    batch = model.preprocess_image(images)
    mask = torch.zeros(2, *batch.tensor.shape[-2:], dtype=torch.int64)
    for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
        row[:height, :width] = 1
    expected = theirs(pixel_values=batch.tensor, pixel_mask=mask)
    found = model.predict(images)
    torch.testing.assert_close(found.logits[-1], expected.logits, rtol=0, atol=2e-4)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, rtol=0, atol=2e-5)

    theirs.save_pretrained(tmp_path / "saved")
    other = build_model(cfg)
    MitiDetrCheckpointer(other, for_training=False).load(str(tmp_path / "saved"))
    assert_same(other.state_dict(), model.state_dict())
