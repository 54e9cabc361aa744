from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.testing import assert_close

from miti_detr.engine import setup_config
from miti_detr.evaluation import MitiDetrWithTTA, tta_config
from miti_detr.evaluation.tta import merge_views, mirror
from tests.fill import filled
from tests.helpers import ROOT, tiny_config

SIZE = (60, 100)


def view(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Instances:
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def plain(instances: Instances) -> tuple[list[list[float]], list[float], list[int]]:
    boxes = instances.pred_boxes.tensor.tolist()
    scores = [round(score, 6) for score in instances.scores.tolist()]
    return boxes, scores, instances.pred_classes.tolist()


def config(*sizes: int, flip: bool) -> CfgNode:
    return tiny_config("TEST.AUG.MIN_SIZES", sizes, "TEST.AUG.MAX_SIZE", 112, "TEST.AUG.FLIP", flip)


class BrightBox(nn.Module):
    """Finds the bright rectangle of an image, with a score of 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": self._find(x)} for x in batched_inputs]

    def _find(self, inputs: dict[str, Any]) -> Instances:
        image = inputs["image"]
        self.seen.append(image)
        rows, columns = (image[0] > 127).nonzero().T
        corners = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        height, width = inputs["height"], inputs["width"]
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
        return Instances(
            (height, width),
            pred_boxes=Boxes((corners * scale)[None]),
            scores=torch.tensor([0.5]),
            pred_classes=torch.tensor([1]),
        )


def test_one_view_gives_the_plain_result() -> None:
    """Exactly, in a padded batch too: the view is the image of a plain evaluation."""
    cfg = config(80, flip=False)
    model = build_model(cfg).eval()
    model.load_state_dict(filled(model.state_dict()))
    resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    full, resized = [], []
    for height, width in ((90, 120), (110, 100)):
        image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
        small = resize.get_transform(image).apply_image(image)
        size = {"height": height, "width": width}
        full.append({"image": torch.from_numpy(image).permute(2, 0, 1), **size})
        resized.append({"image": torch.from_numpy(small).permute(2, 0, 1).contiguous(), **size})
    with torch.no_grad():
        wanted, found = model(resized), MitiDetrWithTTA(cfg, model)(full)
    for one, other in zip(wanted, found, strict=True):
        for field in ("scores", "pred_classes"):
            assert torch.equal(one["instances"].get(field), other["instances"].get(field))
        boxes = (x["instances"].pred_boxes.tensor for x in (one, other))
        assert torch.equal(*boxes)


def test_views_are_resized_and_mirrored_and_boxes_come_back() -> None:
    """Two sizes, each with its mirror image; all four find the object in the same place."""
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    image[:, 10:20, 30:80] = 255
    model = BrightBox()
    (output,) = MitiDetrWithTTA(config(60, 120, flip=True), model)([{"image": image}])
    assert [tuple(x.shape[1:]) for x in model.seen] == [(60, 100), (60, 100), (67, 112), (67, 112)]
    assert torch.equal(model.seen[0], image)
    for one, other in (model.seen[:2], model.seen[2:]):
        assert torch.equal(one.flip(2), other)
    found = output["instances"]
    assert found.image_size == SIZE
    assert found.scores.tolist() == [0.5]
    assert_close(found.pred_boxes.tensor, torch.tensor([[30.0, 10, 80, 20]]), rtol=0, atol=1)
    assert "transforms" not in output


def test_a_mirrored_image_gives_mirrored_boxes() -> None:
    found = view([[10.0, 5.0, 40.0, 20.0], [0.0, 0.0, 100.0, 60.0]], [0.9, 0.8], [0, 1])
    mirrored = mirror(found)
    assert plain(mirrored)[0] == [[60, 5, 90, 20], [0, 0, 100, 60]]
    assert plain(mirror(mirrored)) == plain(found)
    assert plain(mirrored)[1:] == plain(found)[1:]


def test_views_are_averaged() -> None:
    """Boxes by their scores: (0.9 * 10 + 0.3 * 14) / 1.2 = 11; scores (0.9 + 0.3) / 2 = 0.6."""
    merged = merge_views(
        [view([[10.0, 10, 50, 50]], [0.9], [1]), view([[14.0, 10, 50, 50]], [0.3], [1])]
    )
    boxes, scores, classes = plain(merged)
    assert_close(torch.tensor(boxes), torch.tensor([[11.0, 10, 50, 50]]))
    assert (scores, classes) == ([0.6], [1])
    assert merged.image_size == SIZE


def test_what_one_view_finds_counts_as_zero_in_the_others() -> None:
    """Another class or another place is another object."""
    box, far = [10.0, 10.0, 50.0, 50.0], [60.0, 10.0, 90.0, 50.0]
    merged = merge_views([view([box], [0.9], [0]), view([box, far], [0.8, 0.6], [1, 0])])
    assert plain(merged) == ([box, box], [0.45, 0.4], [0, 1])  # as many as a view has
    three = merge_views([view([box], [0.9], [0]), view([], [], []), view([box], [0.6], [0])])
    assert plain(three)[1:] == ([0.5], [0])


def test_matching_is_one_to_one() -> None:
    """A second detection of an object in a view is not added to it, and the better one is."""
    box = [10.0, 10.0, 50.0, 50.0]
    close = [11.0, 10.0, 50.0, 50.0]
    first = view([box, [60.0, 10, 90, 50]], [0.9, 0.5], [0, 0])
    _, scores, _ = plain(merge_views([first, view([box, close], [0.1, 0.8], [0, 0])]))
    assert scores == [0.85, 0.25]
    _, scores, _ = plain(merge_views([first, first, first]))
    assert scores == [0.9, 0.5]


def test_nothing_and_a_score_of_zero() -> None:
    assert len(merge_views([view([], [], []), view([], [], [])])) == 0
    merged = merge_views([view([[0.0, 0, 10, 10]], [0.0], [0])] * 2)
    assert torch.isfinite(merged.pred_boxes.tensor).all()


def test_the_config_of_an_evaluation() -> None:
    cfg = tiny_config("OUTPUT_DIR", "out", "TEST.LOSS", True)
    other = tta_config(cfg)
    assert (other.INPUT.MIN_SIZE_TEST, other.TEST.LOSS, other.OUTPUT_DIR) == (0, False, "out/TTA")
    assert cfg.INPUT.MIN_SIZE_TEST == 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["TEST.AUG.MIN_SIZES", "()"], r"TEST\.AUG\.MIN_SIZES"),
        (["TEST.AUG.MIN_SIZES", "(80, -1)"], r"TEST\.AUG\.MIN_SIZES"),
        (["TEST.AUG.MAX_SIZE", "0"], r"TEST\.AUG\.MAX_SIZE"),
        (["TEST.AUG.MIN_SIZES", "(80, 400)"], r"is \(80, 400\), but .*MIN_SIZE_TEST is 80"),
        (["TEST.AUG.MIN_SIZES", "(26,)"], r"such as \(80,\)"),
        (["MODEL.MASK_ON", "True"], r"MODEL\.MASK_ON is True"),
        (["TEST.AUG.FLIP", "2"], r"TEST\.AUG\.FLIP"),
    ],
)  # fmt: skip
def test_faulty_keys_are_refused(options: list[str], message: str) -> None:
    usual = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(80,)", "MODEL.DEVICE", "cpu"]
    with pytest.raises(ValueError, match=message):
        setup_config(str(ROOT / "configs/shapes/miti_detr.yaml"), [*usual, *options])
