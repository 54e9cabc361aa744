import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances

from miti_detr.evaluation import InstanceEvaluator, PatchEvaluator, build_evaluator
from tests.helpers import tiny_config
from tests.small_shapes import small_shapes

PATCHES = torch.tensor([[0, 0, 40, 40], [50, 10, 90, 50]])


def process(evaluator: PatchEvaluator, image_id: int, boxes: Any, scores: Any) -> None:
    """One image of 100 x 100 with two patches, and these detections."""
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores)
    item = {"image_id": image_id, "file_name": f"{image_id}.png", "height": 100, "width": 100}
    evaluator.process([{**item, "patch_boxes": PATCHES}], [{"instances": instances}])


@pytest.mark.parametrize("fast", [True, False])
def test_found_patches(tmp_path: Path, fast: bool) -> None:
    """All found exactly: 100. One of two in all images, surer than anything else: AP50 is 51 of 101
    recall points; sizes 40 x 40 are COCO's medium ones."""
    evaluator = PatchEvaluator(str(tmp_path), fast=fast)
    process(evaluator, 1, PATCHES.tolist(), [0.9, 0.8])
    perfect = evaluator.evaluate()["bbox"]
    assert perfect["AP"] == pytest.approx(100)
    assert perfect["APm"] == pytest.approx(100)
    assert math.isnan(perfect["APl"])  # there are none
    evaluator.reset()
    process(evaluator, 1, [*PATCHES.tolist()[:1], [60, 60, 70, 70]], [0.9, 0.1])
    half = evaluator.evaluate()["bbox"]
    assert half["AP50"] == pytest.approx(100 * 51 / 101)
    assert half["AR"] == pytest.approx(50)
    truth = json.loads((tmp_path / "patches.json").read_text())
    assert [a["bbox"] for a in truth["annotations"]] == [[0, 0, 40, 40], [50, 10, 40, 40]]


def test_an_image_that_comes_twice_counts_once(tmp_path: Path) -> None:
    evaluator = PatchEvaluator(str(tmp_path))
    for _ in range(2):
        process(evaluator, 5, PATCHES.tolist(), [0.9, 0.8])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_no_image_and_no_detection(tmp_path: Path) -> None:
    evaluator = PatchEvaluator(str(tmp_path))
    assert evaluator.evaluate() == {}
    process(evaluator, 1, [], [])
    assert math.isnan(evaluator.evaluate()["bbox"]["AP"])  # as Detectron2's own evaluator


def test_which_evaluator(tmp_path: Path) -> None:
    cfg = tiny_config("OUTPUT_DIR", str(tmp_path), "INPUT.PATCHES.NUMBER", 2)
    assert isinstance(build_evaluator(cfg, "any"), PatchEvaluator)
    cfg.INPUT.PATCHES.NUMBER = 0
    with small_shapes(tmp_path):
        assert isinstance(build_evaluator(cfg, "shapes_val"), InstanceEvaluator)
