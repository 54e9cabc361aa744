"""The validation loss of an evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from miti_detr.data import build_test_loader, register_coco_format
from miti_detr.engine import Trainer
from miti_detr.engine.hooks import read_records
from miti_detr.engine.validation import with_losses
from tests.data.helpers import annotation, coco_content, write_coco
from tests.engine.stub import config as stub_config
from tests.helpers import tiny_config

COUNTS = (0, 3, 1, 0, 2, 9, 5)  # objects of each image, of which one has more than queries


@pytest.fixture
def data(tmp_path: Path) -> Any:
    """A registered data set of images of one size, and one without objects."""
    owners = [image for image, count in enumerate(COUNTS, start=1) for _ in range(count)]
    records = [annotation(i, image, category_id=(5, 9)[i % 2]) for i, image in enumerate(owners, 1)]
    sizes = ((48, 32),) * len(COUNTS)
    files = {"objects": coco_content(records, sizes), "bare": coco_content([], sizes)}
    yield [
        [name, str(write_coco(tmp_path / name, content)), str(tmp_path / name)]
        for name, content in files.items()
    ]
    for name in files:
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog:
                catalog.remove(name)


def _config(data: Any, output: Path, *overrides: Any) -> CfgNode:
    cfg = tiny_config(
        *("MODEL.DETR.NUM_CLASSES", 2, "MODEL.DETR.DROPOUT", 0.3, "DATASETS.COCO_FORMAT", data),
        *("DATASETS.TRAIN", ("objects",), "DATASETS.TEST", ("objects",), "TEST.LOSS", True),
        *("INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SIZE_TEST", 32, "TEST.IMS_PER_BATCH", 3),
        *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 2, "SEED", 1),
        *("SOLVER.EPOCHS", 0, "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(output), *overrides),
    )
    register_coco_format(cfg)
    return cfg


def test_it_is_the_loss_of_the_whole_data_set(data: Any, tmp_path: Path) -> None:
    """As if all images were one batch, whatever the batches are, without dropout; the detections do
    not change.
    """
    cfg = _config(data, tmp_path)
    model = build_model(cfg).eval()
    everything = [item for batch in build_test_loader(cfg, "objects") for item in batch]
    with torch.no_grad():
        expected = model.losses(model.predict(everything), everything)
        detected = model(everything)
    expected["total_loss"] = sum(expected.values())
    for size in (1, 3, 7):
        measured, evaluator = with_losses(model)
        evaluator.reset()
        found = []
        with torch.no_grad():
            for start in range(0, len(everything), size):
                found += measured(everything[start : start + size])
        losses = evaluator.evaluate()["validation"]
        assert losses.keys() == expected.keys()
        for name, value in losses.items():
            assert value == pytest.approx(float(expected[name]), rel=1e-5), name
        for one, other in zip(found, detected, strict=True):
            scores = one["instances"].scores
            torch.testing.assert_close(scores, other["instances"].scores, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_it_is_logged_and_changes_nothing(data: Any, tmp_path: Path) -> None:
    """In metrics.json, for each data set; the run and its table are those without it."""
    weights = []
    for name in ("with", "without"):
        cfg = _config(data, tmp_path / name, "DATASETS.TEST", ("objects", "bare"))
        cfg.merge_from_list(["TEST.LOSS", name == "with", "TEST.EVAL_PERIOD", 1])
        trainer = Trainer(cfg)
        trainer.train()
        assert trainer.model.training
        weights.append(trainer.model.state_dict())
    torch.testing.assert_close(*map(dict, weights), rtol=0, atol=0)
    names = {k for r in read_records(str(tmp_path / "with/metrics.json")) for k in r}
    losses = {"total_loss", "loss_ce", "loss_bbox", "loss_giou"}
    losses |= {f"{name}_0" for name in losses - {"total_loss"}}
    assert {k for k in names if "validation" in k} == {f"objects/validation/{k}" for k in losses}
    records = [read_records(str(tmp_path / x / "metrics.json")) for x in ("with", "without")]
    keys = {key for record in records[1] for key in record} - {"time", "data_time"}
    assert {"diag/class_error", "objects/bbox/AP"} <= keys
    for key in keys - {"eta_seconds", "rank_data_time"}:
        values = [[record.get(key) for record in run] for run in records]
        assert values[0] == values[1] or "AP" in key, key
    tables = [(tmp_path / x / "inference/coco_table.txt").read_text() for x in ("with", "without")]
    assert tables[0] == tables[1]


def test_other_models_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    cfg = stub_config(tiny_data, tmp_path, TEST__LOSS=True, DATASETS__TEST=("tiny_val",))
    with pytest.raises(ValueError, match=r"TEST.LOSS is True, which needs .* a TinyDetector"):
        Trainer.test(cfg, Trainer.build_model(cfg))
