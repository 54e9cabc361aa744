"""The complete R50 models on the weights and images that the goldens were computed with."""

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.checkpoint import convert_state_dict
from tests.checkpoint.helpers import hollow, r50_config
from tests.fill import filled, image


@pytest.mark.slow
@torch.no_grad()
def test_miti_differs_from_detr_by_more_than_half_a_logit():
    official = filled(hollow("detr_r50"))
    inputs = [{"image": image("image:0", 160, 224)}, {"image": image("image:1", 192, 128)}]
    logits = {}
    for residual in ("none", "before_norm"):
        model = build_model(
            r50_config(
                *("MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", 91),
                *("MODEL.DETR.LAYER_RESIDUAL", residual),
            )
        )
        state, _ = convert_state_dict(official, num_classes=91)
        model.load_state_dict(state, strict=True)
        logits[residual] = model.eval().predict(inputs).logits
    assert logits["none"].shape == (6, 2, 100, 92)
    assert (logits["none"] - logits["before_norm"]).abs().mean() > 0.5
