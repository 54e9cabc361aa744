"""The two kinds of class losses."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.modeling.classification import FocalLoss, SoftmaxLoss
from tests.helpers import tiny_config, training_input

INPUTS = [training_input((64, 96), [[4, 5, 30, 40]], [2]), training_input((48, 48), [], [], 1)]


def test_focal_loss_of_one_query():
    """alpha (1-p)^2 (-log p) of its class, (1-alpha) p^2 (-log(1-p)) of the other, / 2 objects."""
    p = torch.tensor([0.3, 0.6], dtype=torch.float64)
    loss = FocalLoss(2)(p.logit().view(1, 1, 1, 2), torch.tensor([[[0]]]), torch.tensor(2.0))
    expected = 0.25 * 0.7**2 * -math.log(0.3) + 0.75 * 0.6**2 * -math.log(0.4)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-6)


def test_focal_cost():
    """Loss of the class being there minus loss of its being absent."""
    p = torch.tensor([0.3, 0.6], dtype=torch.float64)
    cost = FocalLoss(2).cost(p.logit().view(1, 1, 1, 2), torch.tensor([[[[1, 0]]]]))
    expected = [
        0.25 * (1 - q) ** 2 * -math.log(q) - 0.75 * q**2 * -math.log(1 - q) for q in (0.6, 0.3)
    ]
    torch.testing.assert_close(cost.flatten().tolist(), expected, rtol=1e-6, atol=0)


def test_focal_loss_without_objects_is_finite():
    loss = FocalLoss(3)(torch.zeros(2, 1, 4, 3), torch.full((2, 1, 4), 3), torch.tensor(0.0))
    expected = 4 * 3 * 0.75 * 0.25 * math.log(2)
    torch.testing.assert_close(loss, torch.full((2,), expected), rtol=1e-5, atol=0)


def test_a_query_may_be_several_detections():
    logits = torch.tensor([[[3.0, 2.0], [1.0, -4.0]]])
    scores, classes, queries = FocalLoss(2, max_detections=3).read(logits)
    assert (classes.tolist(), queries.tolist()) == ([[0, 1, 0]], [[0, 0, 1]])
    expected = torch.tensor([[3.0, 2.0, 1.0]]).sigmoid()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_softmax_reads_every_query():
    _, classes, queries = SoftmaxLoss(2).read(torch.tensor([[[3.0, 2.0, 9.0], [1.0, 4.0, 0.0]]]))
    assert (classes.tolist(), queries.tolist()) == ([[0, 1]], [[0, 1]])


def test_detr_with_focal_loss_and_300_queries():
    cfg = tiny_config(
        *("MODEL.DETR.CLASS_LOSS", "focal", "MODEL.DETR.NUM_OBJECT_QUERIES", 300),
        *("TEST.DETECTIONS_PER_IMAGE", 50),
    )
    model = build_model(cfg)
    assert model.class_embed.out_features == 3
    scores = model.class_embed.bias.sigmoid()
    torch.testing.assert_close(scores, torch.full((3,), 0.01), rtol=0, atol=1e-6)
    losses = model(INPUTS)
    assert torch.isfinite(sum(losses.values()))
    with torch.no_grad():
        found = model.eval()(INPUTS)[0]["instances"]
    assert len(found) <= 50
    assert (found.scores.diff() <= 0).all()
    assert model.variant["class_loss"] == "focal"
