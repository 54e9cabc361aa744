"""MODEL.DETR.FROZEN_WEIGHTS: loaded before the first training step, and not overridden."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from miti_detr.checkpoint import CheckpointError, MitiDetrCheckpointer
from tests.checkpoint.helpers import assert_same, tiny_model
from tests.modeling.segmentation.helpers import mask_input, mask_model

MASK_KEYS = ("bbox_attention.", "mask_head.")


@pytest.fixture
def detector(tmp_path):
    """A checkpoint of a detector, and its weights."""
    model = tiny_model(1)
    MitiDetrCheckpointer(model, str(tmp_path)).save("detector")
    return str(tmp_path / "detector.pth"), model.state_dict()


def frozen(path, *overrides):
    return mask_model("MODEL.DETR.FROZEN_WEIGHTS", path, *overrides)


def parts(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    masks = {k: v for k, v in state.items() if k.startswith(MASK_KEYS)}
    return {k: v for k, v in state.items() if k not in masks}, masks


def step(model):
    return model.train()([mask_input((40, 48), [[4, 4, 30, 20]], [1])])


def test_weights_are_loaded_before_the_first_step(detector, caplog):
    path, weights = detector
    model = frozen(path)
    masks = parts(model)[1]
    with caplog.at_level("INFO", logger="miti_detr"):
        step(model)
        step(model)
    assert caplog.text.count("the detector is frozen") == 1
    assert_same(parts(model)[0], weights)
    assert_same(parts(model)[1], masks)


@pytest.mark.parametrize("checkpointer", [MitiDetrCheckpointer, DetectionCheckpointer])
def test_other_weights_do_not_override_them(checkpointer, detector, tmp_path, caplog):
    """MODEL.WEIGHTS of another mask model gives its mask head only, and that is logged."""
    path, weights = detector
    other = mask_model(seed=7)
    MitiDetrCheckpointer(other, str(tmp_path)).save("other")
    model = frozen(path)
    checkpointer(model).resume_or_load(str(tmp_path / "other.pth"), resume=False)
    with caplog.at_level("INFO", logger="miti_detr"):
        step(model)
    assert "whatever MODEL.WEIGHTS says of them" in caplog.text
    assert_same(parts(model)[0], weights)
    assert_same(parts(model)[1], parts(other)[1])


def test_evaluation_keeps_the_weights_of_the_model(detector, tmp_path):
    """Those of a trained mask head include its detector; the file need not be there any more."""
    other = mask_model(seed=7)
    MitiDetrCheckpointer(other, str(tmp_path)).save("other")
    model = frozen("gone.pth")
    MitiDetrCheckpointer(model).load(str(tmp_path / "other.pth"))
    with torch.no_grad():
        model.eval()([mask_input((40, 48), [], [])])
    assert_same(model.state_dict(), other.state_dict())


def test_a_copy_does_not_load_again(detector):
    path, _ = detector
    model = frozen(path)
    step(model)
    model.frozen_weights = "gone.pth"
    step(copy.deepcopy(model))


def test_weights_with_masks_give_the_detector(tmp_path):
    other = mask_model(seed=7)
    MitiDetrCheckpointer(other, str(tmp_path)).save("other")
    model = frozen(str(tmp_path / "other.pth"))
    masks = parts(model)[1]
    step(model)
    assert_same(parts(model)[0], parts(other)[0])
    assert_same(parts(model)[1], masks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.DETR.LAYER_RESIDUAL", "none"), "computes something else"),
        (("MODEL.DETR.NUM_CLASSES", 4), r"2 of its tensors are missing, such as class_embed\.w"),
        (("MODEL.DETR.DIM_FEEDFORWARD", 32), r"linear1\.weight has shape"),
    ],
)
def test_weights_of_another_detector_are_refused(overrides, message, detector):
    with pytest.raises(CheckpointError, match=rf"FROZEN_WEIGHTS .*detector\.pth: .*{message}"):
        step(frozen(detector[0], *overrides))


def test_a_backbone_is_no_detector(detector, tmp_path):
    _, weights = detector
    backbone = {k.removeprefix("backbone.body."): v for k, v in weights.items() if "body." in k}
    torch.save(backbone, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=r"FROZEN_WEIGHTS"):
        step(frozen(str(tmp_path / "backbone.pth")))
    with pytest.raises(CheckpointError, match=r"FROZEN_WEIGHTS gone\.pth: gone\.pth: no such file"):
        step(frozen("gone.pth"))
