import logging

import pytest
import torch

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
        check_variant(model, weights, for_training=False)
        return
    with pytest.raises(CheckpointError) as caught:
        check_variant(model, weights, for_training=False)
    text = str(caught.value)
    assert all(key in text for key in keys)
    assert f"state MODEL.DETR.WEIGHTS_RESIDUAL {model['layer_residual']}" in text
    assert "a warm start" in check_variant(model, weights, for_training=True)


def test_words():
    assert describe(variant("none")) == "DETR (ceil padding mask)"
    assert describe({"layer_residual": "none"}) == "DETR"
    assert describe(variant(stacks="encoder")) == (
        "Miti-DETR (before_norm, encoder only, ceil padding mask)"
    )
    said = check_variant(variant("none"), weights_variant(None), for_training=False)
    assert "does not say its layer residual: taken as DETR" in said
    assert "MODEL.DETR.WEIGHTS_RESIDUAL" in said


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
    """Refused for evaluation with the two ways on; for training it is a warm start, and said."""
    model, path = tiny_model(1), str(files / "none.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"these are DETR.*the model is Miti-DETR") as caught:
        MitiDetrCheckpointer(model).load(path)
    assert str(caught.value).startswith(path)
    assert f"set {RESIDUAL} none" in str(caught.value)
    for key, value in model.state_dict().items():  # refused before anything was changed
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    with caplog.at_level(logging.INFO):
        MitiDetrCheckpointer(model, for_training=True).load(path)
    assert "weights into a Miti-DETR" in caplog.text
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
