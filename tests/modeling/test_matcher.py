import pytest
import torch

from miti_detr.modeling import HungarianMatcher
from tests.helpers import load_golden

GOLDEN = load_golden("matcher")


def golden_inputs():
    targets = [
        {"labels": GOLDEN[f"in.labels{i}"], "boxes": GOLDEN[f"in.tboxes{i}"].double()}
        for i in range(3)
    ]
    return GOLDEN["in.logits"].double(), GOLDEN["in.boxes"].double(), targets


def golden_matcher():
    class_weight, l1_weight, giou_weight = GOLDEN["weights_class_l1_giou"].tolist()
    return HungarianMatcher(class_weight=class_weight, l1_weight=l1_weight, giou_weight=giou_weight)


def test_matches_equal_published():
    for index, (query, target) in enumerate(golden_matcher()(*golden_inputs())):
        torch.testing.assert_close(query, GOLDEN[f"pred_index{index}"], rtol=0, atol=0)
        torch.testing.assert_close(target, GOLDEN[f"target_index{index}"], rtol=0, atol=0)


def test_costs_equal_published():
    logits, boxes, targets = golden_inputs()
    costs = golden_matcher().costs(logits[None], boxes[None], targets)[0]
    for index, target in enumerate(targets):
        expected = GOLDEN[f"cost{index}"]
        torch.testing.assert_close(
            costs[index, :, : len(target["labels"])], expected, rtol=1e-9, atol=1e-10
        )


def test_layers_are_matched_each_on_their_own():
    logits, boxes, targets = golden_inputs()
    matcher = golden_matcher()
    flipped = torch.stack([logits, logits.flip(1)]), torch.stack([boxes, boxes.flip(1)])
    layer, image, query, target = matcher.match_layers(*flipped, targets)
    first, second = layer == 0, layer == 1
    assert first.sum() == second.sum() == 13
    pairs = {tuple(row) for row in torch.stack([image, query, target], 1)[first].tolist()}
    mirrored = torch.stack([image, 19 - query, target], 1)[second].tolist()
    assert {tuple(row) for row in mirrored} == pairs


def test_hand_made_case_prefers_class_then_box():
    """Two queries on the same box; the one that believes in class 0 takes it."""
    logits = torch.tensor([[[0.0, 5.0, 0.0], [5.0, 0.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2]] * 2])
    target = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    assert [x.tolist() for x in HungarianMatcher()(logits, boxes, target)[0]] == [[1], [0]]


def test_more_objects_than_queries_and_none():
    objects = {"labels": torch.zeros(5, dtype=torch.int64), "boxes": torch.rand(5, 4)}
    nothing = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    (query, target), empty = HungarianMatcher()(
        torch.randn(2, 3, 4), torch.rand(2, 3, 4), [objects, nothing]
    )
    assert query.tolist() == [0, 1, 2]
    assert len(set(target.tolist())) == 3
    assert [len(x) for x in empty] == [0, 0]
    both_empty = HungarianMatcher()(torch.randn(1, 3, 4), torch.rand(1, 3, 4), [nothing])
    assert [len(x) for x in both_empty[0]] == [0, 0]


def test_non_finite_predictions_are_matched_somehow():
    """The loss is then non-finite, and its check names the images; scipy's error would not."""
    logits = torch.full((1, 3, 3), float("nan"))
    target = [{"labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}]
    assert len(HungarianMatcher()(logits, torch.rand(1, 3, 4), target)[0][0]) == 1


def test_all_weights_zero_is_refused():
    with pytest.raises(ValueError, match="all 0"):
        HungarianMatcher(class_weight=0, l1_weight=0, giou_weight=0)
