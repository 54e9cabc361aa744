import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

import miti_detr
from miti_detr.checkpoint import CheckpointError, MitiDetrCheckpointer
from miti_detr.checkpoint.variant import (
    check_variant,
    describe,
    make_record,
    variant_of,
    weights_variant,
)
from tests.checkpoint.helpers import tiny_config, tiny_model
from tests.helpers import training_input

RESIDUAL = "MODEL.DETR.LAYER_RESIDUAL"


def variant(residual="before_norm", stacks="both", mask="ceil", pre_norm=False):
    return {
        "layer_residual": residual,
        "layer_residual_in": stacks,
        "pre_norm": pre_norm,
        "padding_mask": mask,
        "num_classes": 3,
    }


@pytest.mark.parametrize(
    ("model", "record", "stated", "keys"),
    [
        # (model, what the file records, what the user states) -> keys that differ
        (variant(), variant(), "", []),
        (variant("none"), None, "", []),
        (variant("none"), variant("none", stacks="encoder"), "", []),
        (variant(), None, "", ["LAYER_RESIDUAL none"]),
        (variant(), variant("none"), "", ["LAYER_RESIDUAL none"]),
        (variant("after_norm"), variant(), "", ["LAYER_RESIDUAL before_norm"]),
        (variant(), variant(stacks="encoder"), "", ["LAYER_RESIDUAL_IN encoder"]),
        (variant(), variant(mask="nearest"), "", ["PADDING_MASK nearest"]),
        (
            variant("none"),
            variant(stacks="decoder", mask="nearest"),
            "",
            ["RESIDUAL before_norm", "RESIDUAL_IN decoder", "PADDING_MASK nearest"],
        ),
        (variant(), None, "before_norm", []),
        (variant(), variant("none"), "before_norm", []),
        (variant("none"), None, "before_norm", ["LAYER_RESIDUAL before_norm"]),
        ({}, variant("none"), "", []),
    ],
)
def test_evaluation_needs_the_same_function(model, record, stated, keys):
    weights = weights_variant(record, stated)
    if not keys:
        check_variant(model, weights, purpose="evaluate")
        return
    with pytest.raises(CheckpointError) as caught:
        check_variant(model, weights, purpose="evaluate")
    text = str(caught.value)
    assert all(key in text for key in keys)
    if any("LAYER_RESIDUAL " in key for key in keys):
        assert f"state MODEL.DETR.WEIGHTS_RESIDUAL {model['layer_residual']}" in text
    text = check_variant(model, weights, purpose="warm_start")
    assert all(key in text for key in keys)
    with pytest.raises(CheckpointError, match=r"A run is resumed as it was begun"):
        check_variant(model, weights, purpose="resume")


def test_words():
    assert describe(variant("none")) == "DETR (ceil padding mask)"
    assert describe({"layer_residual": "none"}) == "DETR"
    assert describe(variant(stacks="encoder")) == (
        "Miti-DETR (before_norm, encoder only, ceil padding mask)"
    )


def test_stated_residual_must_be_one():
    with pytest.raises(ValueError, match="WEIGHTS_RESIDUAL is 'before'; use"):
        weights_variant(None, "before")


def test_record_holds_variant_version_and_config():
    cfg = tiny_config()
    record = make_record(variant(), cfg)
    assert record == {**variant(), "version": miti_detr.__version__, "config": cfg.dump()}
    assert variant_of(torch.nn.Linear(1, 1)) is None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights as a DETR, as a Miti-DETR, and without a record."""
    folder = tmp_path_factory.mktemp("variants")
    for residual in ("none", "before_norm"):
        model = tiny_model(0, RESIDUAL, residual)
        MitiDetrCheckpointer(model, str(folder)).save(residual)
    torch.save({"model": dict(model.state_dict())}, folder / "unrecorded.pth")
    return folder


def test_detr_checkpoint_in_a_miti_model(files, caplog):
    """Refused for evaluation, with both remedies; a warm start with a message for training."""
    model, path = tiny_model(1), str(files / "none.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"these are DETR.*the model is Miti-DETR") as caught:
        MitiDetrCheckpointer(model).load(path)
    assert str(caught.value).startswith(path)
    assert f"Set {RESIDUAL} none" in str(caught.value)
    for key, value in model.state_dict().items():  # refused before anything was changed
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    with caplog.at_level(logging.INFO):
        MitiDetrCheckpointer(model, for_training=True).load(path)
    assert "a warm start" in caplog.text
    weight = model.state_dict()["query_embed.weight"]
    torch.testing.assert_close(weight, torch.load(path)["model"]["query_embed.weight"])


def test_checkpointables_mean_training(files):
    model = tiny_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    MitiDetrCheckpointer(model, optimizer=optimizer).load(str(files / "none.pth"))
    with pytest.raises(CheckpointError, match="these are DETR"):
        MitiDetrCheckpointer(model, for_training=False, optimizer=optimizer).load(
            str(files / "none.pth")
        )


def test_statement_goes_before_record_and_guess(files):
    cfg = tiny_config("MODEL.DETR.WEIGHTS_RESIDUAL", "before_norm")
    for name in ("none", "unrecorded"):
        MitiDetrCheckpointer(tiny_model(1), cfg=cfg).load(str(files / f"{name}.pth"))
    with pytest.raises(CheckpointError, match="stated by MODEL"):
        MitiDetrCheckpointer(tiny_model(1, RESIDUAL, "none"), cfg=cfg).load(str(files / "none.pth"))


def test_file_without_record_is_taken_as_detr_and_that_is_said(files, caplog):
    path = str(files / "unrecorded.pth")
    with caplog.at_level(logging.INFO):
        MitiDetrCheckpointer(tiny_model(1, RESIDUAL, "none")).load(path)
    assert "taken as DETR (MODEL.DETR.WEIGHTS_RESIDUAL states it)" in caplog.text
    with pytest.raises(CheckpointError, match="taken as DETR"):
        MitiDetrCheckpointer(tiny_model(1)).load(path)


@pytest.mark.parametrize("for_training", [True, False])
def test_norm_order_is_never_mixed(files, for_training):
    model = tiny_model(1, "MODEL.DETR.PRE_NORM", True)
    with pytest.raises(CheckpointError, match=r"post-norm.*set MODEL.DETR.PRE_NORM False"):
        MitiDetrCheckpointer(model, for_training=for_training).load(str(files / "before_norm.pth"))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("MODEL.DETR.NHEADS", 4), "MODEL.DETR.NHEADS 2"),
        (("INPUT.FORMAT", "BGR"), "INPUT.FORMAT RGB"),
        (("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]), "MODEL.PIXEL_STD [58.395,57.12,57.375]"),
        (("MODEL.PIXEL_MEAN", [1.0, 1.0, 1.0]), "MODEL.PIXEL_MEAN [123.675,116.28,103.53]"),
        (("MODEL.DETR.PADDING_MASK", "nearest"), "MODEL.DETR.PADDING_MASK ceil"),
    ],
)
def test_whatever_decides_the_function_is_recorded(files, overrides, key, caplog):
    """Refused for evaluation and on resume, a warning for training; remembered in stock flows."""
    path = str(files / "before_norm.pth")
    with pytest.raises(CheckpointError) as caught:
        MitiDetrCheckpointer(tiny_model(1, *overrides)).load(path)
    assert f"Set {key}" in str(caught.value)
    MitiDetrCheckpointer(tiny_model(1, *overrides), for_training=True).load(path)
    assert any(key in r.message for r in caplog.records if r.levelname == "WARNING")
    stock = tiny_model(1, *overrides)
    DetectionCheckpointer(stock.train()).load(path)
    inputs = [training_input((48, 64), [[4, 5, 20, 30]], [1])]
    with pytest.raises(CheckpointError, match="computes something else"):
        stock.eval()(inputs)
    stock.train()(inputs)  # a warm start
    assert len(stock.eval()(inputs)) == 1


def test_a_resumed_run_keeps_its_variant(tmp_path):
    model = tiny_model(0)
    MitiDetrCheckpointer(model, str(tmp_path)).save("model_0000001")
    other = tiny_model(1, RESIDUAL, "none")
    with pytest.raises(
        CheckpointError, match=r"A run is resumed as it was begun: set .*before_norm"
    ):
        MitiDetrCheckpointer(other, str(tmp_path), for_training=True).resume_or_load("")


@pytest.mark.parametrize("record", [[], "none", {"layer_residual": 3}, {"residual_strength": 5}])
def test_damaged_records_are_named(record, tmp_path):
    torch.save({"model": tiny_model(0).state_dict(), "miti_detr": record}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: the record"):
        MitiDetrCheckpointer(tiny_model(1)).load(str(tmp_path / "w.pth"))


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = tiny_model(0)
    model.bbox_embed.layers[1].bias.data[3] = torch.nan
    MitiDetrCheckpointer(model, str(tmp_path)).save("w")
    with pytest.raises(CheckpointError, match=r"bbox_embed\.layers\.1\.bias holds values"):
        MitiDetrCheckpointer(tiny_model(1)).load(str(tmp_path / "w.pth"))


def test_classes_of_our_own_files_are_never_taken_for_coco_ids(tmp_path):
    """91 rows are 90 classes, not the COCO ids 0 to 90."""
    model = tiny_model(0, "MODEL.DETR.NUM_CLASSES", 90)
    MitiDetrCheckpointer(model, str(tmp_path)).save("w")
    same = tiny_model(1, "MODEL.DETR.NUM_CLASSES", 90)
    MitiDetrCheckpointer(same).load(str(tmp_path / "w.pth"))
    torch.testing.assert_close(same.class_embed.weight, model.class_embed.weight, rtol=0, atol=0)
    eighty = tiny_model(1, "MODEL.DETR.NUM_CLASSES", 80)
    head = eighty.class_embed.weight.detach().clone()
    MitiDetrCheckpointer(eighty, for_training=True).load(str(tmp_path / "w.pth"))
    torch.testing.assert_close(eighty.class_embed.weight, head, rtol=0, atol=0)
