import copy
import logging
import pickle

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from miti_detr.checkpoint import (
    CheckpointError,
    MitiDetrCheckpointer,
    accept_weights,
    to_d2_wrapper,
    to_official,
)
from miti_detr.checkpoint.convert import reverse_huggingface
from tests.checkpoint.helpers import assert_same, r50_config, tiny_model
from tests.checkpoint.test_checkpointer import RESNET18
from tests.helpers import training_input

RESIDUAL = "MODEL.DETR.LAYER_RESIDUAL"


def resnet18(seed, *overrides):
    torch.manual_seed(seed)
    return build_model(r50_config(*RESNET18, *overrides))


@pytest.mark.slow
@pytest.mark.parametrize("export", [to_d2_wrapper, reverse_huggingface])
def test_stock_checkpointer_reads_foreign_files(export, tmp_path, caplog):
    model, other = resnet18(0), resnet18(1)
    torch.save({"model": export(model.state_dict())}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        DetectionCheckpointer(other.eval()).load(str(tmp_path / "w.pth"))
    assert_same(other.state_dict(), model.state_dict())
    assert "recognised" in caplog.text
    assert "taken as DETR" in caplog.text


def test_stock_checkpointer_cannot_pass_on_coco_rows_and_that_is_logged(tmp_path, caplog):
    model, other = resnet18(0), resnet18(1)
    head = other.class_embed.weight.detach().clone()
    torch.save(to_official(model.state_dict()), tmp_path / "w.pth")
    DetectionCheckpointer(other.train()).load(str(tmp_path / "w.pth"))
    assert "left out on the way here: load them with MitiDetrCheckpointer" in caplog.text
    torch.testing.assert_close(other.class_embed.weight, head, rtol=0, atol=0)
    torch.testing.assert_close(other.input_proj.weight, model.input_proj.weight, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="run `miti-detr convert` first"):  # random classes
        other.eval()([training_input((32, 32), [], [])])


def test_variant_travels_with_the_stock_checkpointer(tmp_path, caplog):
    """Saved by Detectron2's own; a mismatch is a warning, and an error in the first inference."""
    inputs = [training_input((32, 32), [], [])]
    DetectionCheckpointer(tiny_model(0, RESIDUAL, "none"), str(tmp_path)).save("detr")
    path = str(tmp_path / "detr.pth")
    same = tiny_model(1, RESIDUAL, "none")
    DetectionCheckpointer(same).load(path)
    same.eval()(inputs)
    assert not caplog.records or "computes something else" not in caplog.text
    for mode in (True, False):  # whether the weights are loaded before or after eval()
        other = tiny_model(1).train(mode)
        DetectionCheckpointer(other).load(path)
        assert "computes something else" in caplog.text
        with pytest.raises(CheckpointError, match=r"these are DETR.*the model is Miti-DETR"):
            other.eval()(inputs)
        with pytest.raises(CheckpointError, match="these are DETR"):  # not only once
            other(inputs)
        accept_weights(other)
        other(inputs)
    with pytest.raises(CheckpointError, match="recorded in the file"):
        MitiDetrCheckpointer(tiny_model(1)).load(path)


def test_variant_travels_in_a_parallel_wrapper(tmp_path):
    """``torch.save(ddp_model.state_dict())``: ``module.`` before every key."""
    wrapped = torch.nn.ModuleDict({"module": tiny_model(0, RESIDUAL, "none")})
    torch.save(wrapped.state_dict(), tmp_path / "ddp.pth")
    MitiDetrCheckpointer(tiny_model(1, RESIDUAL, "none")).load(str(tmp_path / "ddp.pth"))
    with pytest.raises(CheckpointError, match="recorded in the file"):
        MitiDetrCheckpointer(tiny_model(1)).load(str(tmp_path / "ddp.pth"))


def test_our_checkpointer_decides_alone(tmp_path):
    """What it lets pass (a statement, a warm start) the hooks do not stop again."""
    MitiDetrCheckpointer(tiny_model(0, RESIDUAL, "none"), str(tmp_path)).save("detr")
    MitiDetrCheckpointer(tiny_model(1).eval(), for_training=True).load(str(tmp_path / "detr.pth"))


@pytest.mark.parametrize("strict", [True, False])
def test_strictness_and_mode_do_not_matter(strict):
    """A plain dict says nothing of its variant, and passes."""
    detr, miti = tiny_model(0, RESIDUAL, "none").eval(), tiny_model(1).eval()
    inputs = [training_input((32, 32), [], [])]
    miti.load_state_dict(detr.state_dict(), strict=strict)
    assert_same(miti.state_dict(), detr.state_dict())
    with pytest.raises(CheckpointError, match="these are DETR"):
        miti(inputs)
    miti.load_state_dict(dict(detr.state_dict()), strict=strict)
    miti(inputs)


@pytest.mark.slow
def test_foreign_weights_are_refused_by_a_miti_model_in_evaluation():
    official = to_official(resnet18(0).state_dict(), num_classes=80)
    inputs = [training_input((32, 32), [], [])]
    miti = resnet18(1, RESIDUAL, "before_norm").eval()
    miti.load_state_dict(official, strict=False)
    with pytest.raises(CheckpointError, match="taken as DETR"):
        miti(inputs)
    stated = resnet18(1, RESIDUAL, "before_norm", "MODEL.DETR.WEIGHTS_RESIDUAL", "before_norm")
    stated.load_state_dict(official, strict=False)
    stated.eval()(inputs)


def test_model_with_hooks_copies_and_pickles():
    model = tiny_model()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.load_state_dict(model.state_dict())
        assert other.state_dict()._metadata[""]["miti_detr"]["layer_residual"] == "before_norm"


def test_nested_model_is_left_alone():
    model, other = tiny_model(0), tiny_model(1)
    torch.nn.Sequential(other).load_state_dict(torch.nn.Sequential(model).state_dict())
    assert_same(other.state_dict(), model.state_dict())
