import pytest
import torch
from detectron2.utils.events import EventStorage

from miti_detr.modeling import HungarianMatcher, SetCriterion
from tests.helpers import load_golden

GOLDEN = load_golden("criterion")
CASES = {"mixed": 3, "empty": 2, "exact_eos": 2}


def criterion(case, **changes):
    ce, l1, giou, eos = GOLDEN[f"{case}.weights_ce_l1_giou_eos"].tolist()
    weights = {"class_weight": ce, "l1_weight": l1, "giou_weight": giou}
    made = SetCriterion(
        num_classes=5,
        matcher=HungarianMatcher(**weights),
        **{**weights, "no_object_weight": eos, **changes},
    ).double()
    made.empty_weight[-1] = changes.get("no_object_weight", eos)  # a float64 0.1
    return made


def inputs(case):
    logits = GOLDEN[f"{case}.in.logits"].double().requires_grad_()
    boxes = GOLDEN[f"{case}.in.boxes"].double().requires_grad_()
    targets = [
        {
            "labels": GOLDEN[f"{case}.in.labels{i}"],
            "boxes": GOLDEN[f"{case}.in.tboxes{i}"].double(),
        }
        for i in range(CASES[case])
    ]
    return logits, boxes, targets


@pytest.mark.parametrize("case", CASES)
def test_losses_diagnostics_and_gradients_equal_published(case):
    logits, boxes, targets = inputs(case)
    made = criterion(case)
    with EventStorage() as storage:
        losses = made(logits, boxes, targets)
        logged = {key: value for key, (value, _) in storage.latest().items()}
    weights = {"loss_ce": made.class_weight, "loss_bbox": made.l1_weight}
    weights["loss_giou"] = made.giou_weight
    for name, value in zip(
        GOLDEN[f"{case}.loss_names"].tolist(), GOLDEN[f"{case}.loss_values"], strict=True
    ):
        if name.startswith("loss"):
            weight = weights["_".join(name.split("_")[:2])]
            torch.testing.assert_close(losses[name], weight * value, rtol=1e-9, atol=1e-10)
        else:
            assert logged[f"diag/{name}"] == pytest.approx(float(value), abs=1e-4)
    assert len(losses) == 9
    total = sum(losses.values())
    torch.testing.assert_close(total, GOLDEN[f"{case}.total"], rtol=1e-9, atol=1e-10)
    total.backward()
    torch.testing.assert_close(logits.grad, GOLDEN[f"{case}.grad_logits"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(boxes.grad, GOLDEN[f"{case}.grad_boxes"], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_matches_of_each_layer_equal_published(case):
    logits, boxes, targets = inputs(case)
    matches = criterion(case).matcher.match_layers(logits, boxes, targets)
    for layer in range(3):
        for image in range(CASES[case]):
            here = matches[2:, (matches[0] == layer) & (matches[1] == image)]
            expected = GOLDEN[f"{case}.match.layer{layer}.image{image}"]
            torch.testing.assert_close(here, expected, rtol=0, atol=0)


def test_without_deep_supervision_the_last_layer_alone_counts():
    logits, boxes, targets = inputs("mixed")
    last = criterion("mixed", deep_supervision=False)(logits, boxes, targets)
    every = criterion("mixed")(logits, boxes, targets)
    assert sorted(last) == ["loss_bbox", "loss_ce", "loss_giou"]
    for name, value in last.items():
        torch.testing.assert_close(value, every[name], rtol=0, atol=0)


def test_perfect_prediction():
    """Sure of the right class and box: cross-entropy ln(1 + 2 e^-20) and box losses 0."""
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2]])}
    logits = torch.tensor([[[[0.0, 20.0, 0.0], [0.0, 0.0, 20.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.4, 0.2], [0.1, 0.1, 0.1, 0.1]]]])
    losses = SetCriterion(num_classes=2, matcher=HungarianMatcher())(logits, boxes, [target])
    for value in losses.values():
        torch.testing.assert_close(value, torch.zeros(()), rtol=0, atol=1e-6)


def test_half_precision_is_computed_in_float32_under_autocast():
    logits, boxes, targets = inputs("mixed")
    targets = [{"labels": t["labels"], "boxes": t["boxes"].float()} for t in targets]
    made = criterion("mixed").float()
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = made(half, boxes.detach().float(), targets)
    plain = made(half.float(), boxes.detach().float(), targets)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)


def test_no_storage_no_diagnostics():
    assert all(name.startswith("loss_") for name in criterion("mixed")(*inputs("mixed")))
