"""What is recorded for the analysis of a run, and that recording changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from miti_detr.data import build_train_loader
from miti_detr.engine import Trainer, setup_config
from miti_detr.engine.hooks import MatchingRecorder, StepLog
from tests.engine.stub import config
from tests.helpers import ROOT
from tests.small_shapes import small_shapes

SMALL = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.DETR.HIDDEN_DIM": 16,
    "MODEL.DETR.NHEADS": 2,
    "MODEL.DETR.ENC_LAYERS": 1,
    "MODEL.DETR.DEC_LAYERS": 2,
    "MODEL.DETR.DIM_FEEDFORWARD": 32,
    "MODEL.DETR.DROPOUT": 0.1,
    "INPUT.MIN_SIZE_TRAIN": (32, 40),
    "INPUT.MIN_SIZE_TEST": 40,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.STEPS": (),
    "TEST.EVAL_PERIOD": 2,
    "TEST.IMS_PER_BATCH": 3,
}


@pytest.fixture(autouse=True, scope="module")
def _shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with small_shapes(tmp_path_factory.mktemp("shapes")):
        yield


def small_config(output: Path, name: str = "miti_detr", **changes: Any) -> Any:
    values = {**SMALL, "OUTPUT_DIR": str(output)}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    words = [str(word) for pair in values.items() for word in pair]
    return setup_config(str(ROOT / f"configs/shapes/{name}.yaml"), words)


def train(cfg: Any, *hooks: Any) -> Trainer:
    trainer = Trainer(cfg)
    trainer.register_hooks(list(hooks))
    trainer.resume_or_load(resume=True)
    trainer.train()
    return trainer


def test_recording_does_not_change_a_run(tmp_path: Path) -> None:
    """Equal to the bit, with dropout and augmentation: no random number is drawn, no state left."""
    plain = train(small_config(tmp_path / "plain"))
    cfg = small_config(tmp_path / "recorded")
    recorded = train(cfg, MatchingRecorder(cfg, 4), StepLog(cfg.OUTPUT_DIR))
    torch.testing.assert_close(
        plain.model.state_dict(), recorded.model.state_dict(), rtol=0, atol=0
    )
    assert recorded.model.training == plain.model.training

    lines = (tmp_path / "recorded" / "steps.json").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [step["iteration"] for step in steps] == [0, 1, 2, 3]
    assert all(step["total_loss"] > 0 and step["grad_norm"] > 0 for step in steps)
    assert not (tmp_path / "plain" / "steps.json").exists()


def test_recorded_queries_are_those_of_the_matcher(tmp_path: Path) -> None:
    """The last line against the matcher on the final model, one image of the batch at a time."""
    cfg = small_config(tmp_path, TEST__IMS_PER_BATCH=4)
    trainer = train(cfg, MatchingRecorder(cfg, 4))
    lines = [json.loads(line) for line in (tmp_path / "matches.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 4]
    assert lines[-1]["num_queries"] == 10
    recorded = np.array(lines[-1]["queries"])

    recorder = MatchingRecorder(trainer.cfg, 4)
    inputs = [recorder._map(record) for record in recorder._records]
    model: Any = trainer.model.eval()
    with torch.no_grad():
        prediction = model.predict(inputs)
    first = 0
    for image, item in enumerate(inputs):
        height, width = item["image"].shape[-2:]
        left, top, right, bottom = item["instances"].gt_boxes.tensor.double().unbind(1)
        centre = [(left + right) / 2 / width, (top + bottom) / 2 / height]
        size = [(right - left) / width, (bottom - top) / height]
        boxes = torch.stack([*centre, *size], dim=1).float()
        target = {"labels": item["instances"].gt_classes, "boxes": boxes}
        count = len(boxes)
        for layer in range(2):
            one = prediction.logits[layer, image, None], prediction.boxes[layer, image, None]
            ((query, index),) = model.criterion.matcher(*one, [target])
            expected = torch.full((count,), -1).scatter(0, index, query)
            assert recorded[layer, first : first + count].tolist() == expected.tolist()
        first += count
    assert recorded.shape == (2, first)
    assert first > 4


@pytest.mark.slow
def test_a_resumed_run_records_each_evaluation_once(tmp_path: Path) -> None:
    for length in (3, 4):
        cfg = small_config(tmp_path, SOLVER__MAX_ITER=length, SOLVER__CHECKPOINT_PERIOD=1)
        train(cfg, MatchingRecorder(cfg, 2))
    lines = [json.loads(line) for line in (tmp_path / "matches.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 4]  # 3, the end of the first, is no more


def test_arms_start_with_the_same_weights_and_see_the_same_images(tmp_path: Path) -> None:
    """DETR and both Miti-DETRs of one seed; another seed differs in both."""
    placements = ("none", "before_norm", "after_norm")
    configs = [small_config(tmp_path, MODEL__DETR__LAYER_RESIDUAL=p) for p in placements]
    first, *others = [Trainer(cfg) for cfg in configs]
    for other in others:
        torch.testing.assert_close(
            dict(first.model.named_parameters()),
            dict(other.model.named_parameters()),
            rtol=0,
            atol=0,
        )
    streams = [iter(build_train_loader(cfg)) for cfg in configs]
    for _ in range(6):
        batch, *same = [next(stream) for stream in streams]
        for other in same:
            for a, b in zip(batch, other, strict=True):
                assert a["file_name"] == b["file_name"]
                assert torch.equal(a["image"], b["image"])
                assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
    changed = Trainer(small_config(tmp_path, SEED=1))
    assert not torch.equal(changed.model.query_embed.weight, first.model.query_embed.weight)


def test_bad_settings_are_named(tmp_path: Path, tiny_data: Path) -> None:
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is empty"):
        MatchingRecorder(small_config(tmp_path, DATASETS__TEST=()))
    with pytest.raises(ValueError, match="num_images is -1"):
        MatchingRecorder(small_config(tmp_path), -1)
    trainer = Trainer(config(tiny_data, tmp_path, DATASETS__TEST=("tiny_val",)))
    trainer.register_hooks([MatchingRecorder(trainer.cfg, 1)])
    with pytest.raises(ValueError, match="needs a MitiDetr, not TinyDetector"):
        trainer.train()
