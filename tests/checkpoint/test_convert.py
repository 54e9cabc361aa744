import re

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.checkpoint import (
    CheckpointError,
    convert_state_dict,
    recognise,
    to_d2_wrapper,
    to_official,
)
from miti_detr.checkpoint.convert import reverse_huggingface
from tests.checkpoint.helpers import assert_same, hollow, published, r50_config, slim
from tests.helpers import ROOT

HEAD = ("class_embed.weight", "class_embed.bias")
NEW_NAMES = (  # of transformers 5, in memory
    ("backbone.conv_encoder.model", "backbone.model"),
    ("out_proj", "o_proj"),
    ("layers.(\\d+).fc", "layers.\\1.mlp.fc"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "pre_norm", "dropped", "missing"),
    [
        ("detr_r50", "detr", False, 0, ()),
        ("detr_r50_learned_positions", "detr", False, 0, ()),
        ("updetr_finetune", "detr", True, 0, ()),
        ("updetr_pretrain", "up_detr_pretrain", True, 8, HEAD),
        ("detr_panoptic", "detr_panoptic", False, 32, HEAD),
        ("detr_r50_detectron2_80_classes", "d2_wrapper", False, 1, ()),
        ("hf_old", "hf", False, 0, ()),
    ],
)
def test_published_models_load_strictly(name, source, pre_norm, dropped, missing):
    """Every key is the model's, dropped by a table, or of a class head, with a message."""
    position = "learned" if "learned" in name else "sine"
    model = build_model(
        r50_config(
            *("MODEL.DEVICE", "meta"),
            *("MODEL.DETR.PRE_NORM", pre_norm),
            *("MODEL.DETR.POSITION_EMBEDDING", position),
        )
    )
    weights = hollow(name)
    assert recognise(weights) == source
    state, report = convert_state_dict(weights, num_classes=80)
    assert report.source == source
    assert report.pre_norm is pre_norm
    assert len(report.dropped) == dropped
    assert report.reinitialised == missing
    own = model.state_dict()
    assert set(own) - set(state) == set(missing)
    model.load_state_dict({**own, **state}, strict=True, assign=True)
    assert {k: v.shape for k, v in state.items()} == {k: own[k].shape for k in state}


@pytest.mark.slow
def test_published_pretraining_goes_on_in_an_up_detr():
    """Every key of the file is the model's, and the other way round."""
    cfg = r50_config("MODEL.DEVICE", "meta")
    cfg.merge_from_file(str(ROOT / "configs/pretrain/up_detr_R50_imagenet_60ep.yaml"))
    cfg.MODEL.DEVICE = "meta"
    own = build_model(cfg).state_dict()
    state, report = convert_state_dict(hollow("updetr_pretrain"), num_classes=2, pretraining=True)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()}
    assert (report.dropped, report.reinitialised) == ((), ())


def test_swav_is_a_backbone():
    """Its projection head and prototypes are dropped."""
    backbone = {"layer1.0.conv1.weight": torch.ones(1), "projection_head.0.weight": torch.ones(1)}
    state, report = convert_state_dict(
        {**backbone, "prototypes.weight": torch.ones(1)}, num_classes=80
    )
    assert list(state) == ["backbone.body.res2.0.conv1.weight"]
    assert report.dropped == ("projection_head.0.weight", "prototypes.weight")


@pytest.mark.parametrize("name", ["detr_r50", "updetr_finetune", "detr_r50_learned_positions"])
def test_official_and_back(name):
    """Kept rows are equal; rows of unused ids are weight 0 and bias -1e4."""
    weights = slim(name)
    ours, _ = convert_state_dict(weights, num_classes=80)
    back = to_official(ours)
    kept = published()["rows_kept"]
    dropped = [row for row in range(92) if row not in kept]
    for key in HEAD:
        torch.testing.assert_close(back[key][kept], weights[key][kept], rtol=0, atol=0)
        torch.testing.assert_close(ours[key], weights[key][kept], rtol=0, atol=0)
    assert (back[HEAD[0]][dropped] == 0).all()
    assert (back[HEAD[1]][dropped] == -1e4).all()
    assert_same(
        {k: v for k, v in back.items() if k not in HEAD},
        {k: v for k, v in weights.items() if k not in HEAD},
    )


def test_official_with_80_classes_keeps_81_rows():
    ours, _ = convert_state_dict(slim("detr_r50"), num_classes=80)
    assert_same({k: to_official(ours, num_classes=80)[k] for k in HEAD}, {k: ours[k] for k in HEAD})


def test_d2_wrapper_and_back():
    weights = slim("detr_r50_detectron2_80_classes")
    ours, report = convert_state_dict(weights, num_classes=80)
    assert report.dropped == ("criterion.empty_weight",)
    weights.pop("criterion.empty_weight")
    assert_same(to_d2_wrapper(ours), weights)


def test_d2_wrapper_with_a_mask_head():
    """One more ``detr.`` before the detector, as before that of an official one."""
    detector = slim("detr_r50_detectron2_80_classes")
    weights = {f"detr.{k}": v for k, v in detector.items() if k.startswith("detr.")}
    masks = [k for k in slim("detr_panoptic") if k.startswith(("bbox_attention", "mask_head"))]
    weights |= {f"detr.{k}": torch.ones(1) for k in masks}
    weights["criterion.empty_weight"] = torch.ones(81)
    ours, report = convert_state_dict(weights, num_classes=80)
    assert report.source == "d2_wrapper_panoptic"
    assert len(report.dropped) == 32 + 1
    assert_same(ours, convert_state_dict(detector, num_classes=80)[0])


def test_wrapper_and_official_lead_to_the_same_keys():
    ours, _ = convert_state_dict(slim("detr_r50"), num_classes=80)
    theirs, _ = convert_state_dict(slim("detr_r50_detectron2_80_classes"), num_classes=80)
    assert set(ours) == set(theirs)


@pytest.mark.parametrize("generation", ["old", "new"])
def test_huggingface_is_the_official_model_in_parts(generation):
    """Query, key and value are rows 0:C, C:2C, 2C:3C of the packed projections."""
    official = slim("detr_r50")
    theirs = {}
    for key, entry in published()["hf_old_sources"].items():
        rows = slice(*map(int, entry["rows"].split(":"))) if entry["rows"] else slice(None)
        if generation == "new":
            for old, new in NEW_NAMES:
                key = re.sub(old, new, key)
        theirs[key] = official[entry["source"]][rows]
    assert recognise(theirs) == "hf"
    expected, _ = convert_state_dict(official, num_classes=80)
    ours, report = convert_state_dict(theirs, num_classes=80)
    assert_same(ours, expected)
    assert report.mapped == len(theirs)


def test_huggingface_and_back():
    ours, _ = convert_state_dict(slim("detr_r50_learned_positions"), num_classes=80)
    theirs = reverse_huggingface(ours)
    assert set(published()["models"]["hf_old"]) <= set(theirs)
    assert_same(convert_state_dict(theirs, num_classes=80)[0], ours)


def test_huggingface_projection_needs_all_three():
    weights = slim("hf_old")
    del weights["model.decoder.layers.2.encoder_attn.k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"decoder.layers.2.multihead_attn.*2 of 3"):
        convert_state_dict(weights, num_classes=80)


def test_native_and_timm_backbones_of_huggingface_agree():
    """``layer1.0.conv2`` in timm is ``encoder.stages.0.layers.0.layer.1.convolution`` natively."""
    timm = slim("hf_old")
    ours, _ = convert_state_dict(timm, num_classes=80)
    native = {}
    for key, value in timm.items():
        key = re.sub(r"model\.conv1", "model.embedder.embedder.convolution", key)
        key = re.sub(r"model\.bn1", "model.embedder.embedder.normalization", key)
        key = re.sub(
            r"layer(\d)\.(\d+)\.",
            lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.",
            key,
        )
        key = key.replace("downsample.0", "shortcut.convolution")
        key = key.replace("downsample.1", "shortcut.normalization")
        for old, new in (("conv", "convolution"), ("bn", "normalization")):
            key = re.sub(rf"\.{old}(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.{new}.", key)  # noqa: B023
        native[key] = value
    assert_same(convert_state_dict(native, num_classes=80)[0], ours)


@pytest.mark.parametrize("kind", ["torchvision_resnet", "detectron2_resnet"])
def test_resnets(kind):
    """torchvision's names with ``fc`` and batch counters; Detectron2's as arrays."""
    official = {k: v for k, v in slim("detr_r50").items() if k.startswith("backbone")}
    expected, _ = convert_state_dict(official, num_classes=80)
    if kind == "torchvision_resnet":
        weights = {k.removeprefix("backbone.0.body."): v for k, v in official.items()}
        weights |= {"fc.weight": torch.ones(3), "bn1.num_batches_tracked": torch.tensor(1)}
    else:
        weights = {k.removeprefix("backbone.body."): v.numpy() for k, v in expected.items()}
        weights |= {"stem.fc.bias": np.ones(3, dtype=np.float32)}
    ours, report = convert_state_dict(weights, num_classes=80)
    assert report.source == kind
    assert report.pre_norm is None
    assert len(report.dropped) == (2 if kind == "torchvision_resnet" else 1)
    assert_same(ours, expected)


@pytest.mark.parametrize(
    ("rows", "num_classes", "result"),
    [(92, 80, 81), (91, 80, 81), (81, 80, 81), (92, None, 81), (21, None, 21), (92, 91, 92)]
    + [(251, 80, None), (81, 20, None), (91, 20, None)],
)
def test_class_head(rows, num_classes, result):
    weights = slim("detr_r50")
    weights |= {key: torch.randn(rows, *weights[key].shape[1:]) for key in HEAD}
    before = {key: value.clone() for key, value in weights.items()}
    ours, report = convert_state_dict(weights, num_classes=num_classes)
    assert_same(weights, before)  # the input is left as it is
    if result is None:
        assert report.reinitialised == HEAD
        assert not set(HEAD) & set(ours)
        assert len(ours) == report.mapped == len(weights) - 2
        assert f"{rows} rows" in report.summary()
        return
    assert report.reinitialised == ()
    assert [len(ours[key]) for key in HEAD] == [result, result]
    if (rows, result) == (91, 81):
        kept = published()["rows_kept"][:-1]
        torch.testing.assert_close(ours[HEAD[1]][:-1], weights[HEAD[1]][kept], rtol=0, atol=0)
        assert ours[HEAD[1]][-1] == 0
        assert "no-object, which the file lacks, is 0" in report.summary()


def test_unknown_key_names_the_nearest():
    weights = slim("detr_r50")
    weights["transformer.encoder.layers.0.self_atn.in_proj_weight"] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r"self_atn.*nearest.*self_attn.in_proj_\{p\}"):
        convert_state_dict(weights, num_classes=80)


def test_two_keys_for_one_are_refused():
    weights = slim("hf_old")
    key = "model.encoder.layers.0.fc1.bias"
    weights["model.encoder.layers.0.mlp.fc1.bias"] = weights[key]
    with pytest.raises(CheckpointError, match="two keys stand for"):
        convert_state_dict(weights, num_classes=80)


def test_unrecognised_weights_say_what_is_known():
    with pytest.raises(CheckpointError, match=r"'model.0.conv.weight'.*official DETR.*torchvision"):
        convert_state_dict({"model.0.conv.weight": torch.ones(1)}, num_classes=80)


def test_unknown_source_is_named():
    with pytest.raises(ValueError, match="source 'dert' is not one of"):
        convert_state_dict({}, num_classes=80, source="dert")


@pytest.mark.parametrize("export", [to_official, to_d2_wrapper, reverse_huggingface])
def test_exports_are_contiguous(export):
    """Our models hold their kernels in channels_last, which safetensors refuses."""
    ours, _ = convert_state_dict(slim("detr_r50"), num_classes=80)
    key = "backbone.body.stem.conv1.weight"
    ours[key] = ours[key].to(memory_format=torch.channels_last)
    assert not ours[key].is_contiguous()
    assert all(value.is_contiguous() for value in export(ours).values())


@pytest.mark.parametrize("export", [to_official, to_d2_wrapper, reverse_huggingface])
def test_foreign_backbone_cannot_be_exported(export):
    with pytest.raises(
        CheckpointError, match=r"'backbone\.body\.patch_embed\.weight' has no counter"
    ):
        export({"backbone.body.patch_embed.weight": torch.ones(1)})


def test_summary_says_it_all_in_one_line():
    _, report = convert_state_dict(slim("updetr_pretrain"), num_classes=80)
    assert report.summary() == (
        "recognised UP-DETR pre-training: 458 tensors mapped; 8 dropped (class_embed.weight, "
        "class_embed.bias, patch2query.weight, ...); 2 re-initialised (class_embed.weight, "
        "class_embed.bias)"
    )
