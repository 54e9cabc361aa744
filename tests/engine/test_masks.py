"""Runs with masks: on a frozen detector, jointly, and panoptic."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

from miti_detr.engine import Trainer, setup_config
from miti_detr.engine.hooks import read_records
from miti_detr.engine.predictor import Predictor, load_config
from tests.checkpoint.helpers import assert_same
from tests.helpers import ROOT
from tests.small_shapes import small_shapes

TINY = (
    *("MODEL.DETR.HIDDEN_DIM", "32", "MODEL.DETR.NHEADS", "2", "MODEL.DETR.DEC_LAYERS", "1"),
    *("MODEL.DETR.DIM_FEEDFORWARD", "32", "MODEL.DETR.ENC_LAYERS", "1"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
    *("TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.IMS_PER_BATCH", "2"),
)


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with small_shapes(tmp_path_factory.mktemp("data")):
        yield


def run_config(name: str, folder: Path, *overrides: str) -> CfgNode:
    path = str(ROOT / f"configs/shapes/{name}.yaml")
    return setup_config(path, [*TINY, "OUTPUT_DIR", str(folder), *overrides])


def train(cfg: CfgNode, resume: bool = False) -> Any:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer.train()


@pytest.mark.slow
def test_masks_on_a_frozen_detector(tmp_path: Path) -> None:
    """Only the mask head changes; a resumed run ends with the same bits; best by ``segm/AP``."""
    train(run_config("miti_detr", tmp_path / "detector", "MODEL.WEIGHTS", ""))
    detector = str(tmp_path / "detector/model_final.pth")
    frozen = ("MODEL.DETR.FROZEN_WEIGHTS", detector)
    results = train(run_config("miti_detr_masks", tmp_path / "whole", *frozen))
    assert {"bbox", "segm"} <= set(results)
    assert "segm/AP" in read_records(str(tmp_path / "whole/metrics.json"))[-1]
    assert "shapes_val, segm" in (tmp_path / "whole/inference/coco_table.txt").read_text()

    weights = torch.load(tmp_path / "whole/model_final.pth")["model"]
    for key, value in torch.load(detector)["model"].items():
        assert torch.equal(weights[key], value), key

    train(run_config("miti_detr_masks", tmp_path / "halves", *frozen, "SOLVER.MAX_ITER", "1"))
    train(run_config("miti_detr_masks", tmp_path / "halves", *frozen), resume=True)
    assert_same(torch.load(tmp_path / "halves/model_final.pth")["model"], weights)

    predictor = Predictor(load_config(weights=str(tmp_path / "whole/model_final.pth")))
    assert predictor.model.frozen_weights == ""
    image = torch.zeros(64, 80, 3, dtype=torch.uint8).numpy()
    assert predictor([image])[0].pred_masks.shape[1:] == (64, 80)


@pytest.mark.slow
def test_panoptic_run(tmp_path: Path) -> None:
    pytest.importorskip("hotcoco")
    cfg = run_config("miti_detr_panoptic", tmp_path, "MODEL.WEIGHTS", "")
    results = train(cfg)
    assert {"bbox", "segm", "panoptic_seg"} <= set(results)
    assert {"PQ", "PQ_th", "PQ_st", "PQ-stripes"} <= set(results["panoptic_seg"])
    table = (tmp_path / "inference/coco_table.txt").read_text()
    assert "shapes_panoptic_val, panoptic_seg" in table
    assert torch.load(tmp_path / "model_best.pth")["metric"] == "panoptic_seg/PQ"


@pytest.mark.slow
@pytest.mark.parametrize("points", ["0", "30"])
def test_masks_can_be_learned(tmp_path: Path, points: str) -> None:
    """A few images by heart: both losses of the masks fall."""
    keys = ("SOLVER.MAX_ITER", "40", "TEST.EVAL_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "100")
    cfg = run_config(
        "miti_detr_masks",
        tmp_path,
        *(*keys, "MODEL.DETR.FROZEN_WEIGHTS", "", "MODEL.DETR.MASK_POINTS", points),
        *("SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "0.003", "DATASETS.TEST", "()"),
    )
    train(cfg)
    records = [r for r in read_records(str(tmp_path / "metrics.json")) if "loss_dice" in r]
    assert records[-1]["loss_mask"] < 0.8 * records[0]["loss_mask"]
    assert records[-1]["loss_dice"] < 0.95 * records[0]["loss_dice"]
