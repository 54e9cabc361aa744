import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase

from miti_detr.engine import Trainer
from tests.engine.stub import config


class Losses(HookBase):
    """Records total_loss by iteration; ends the run like a kill before iteration ``stop``."""

    def __init__(self, stop: int = -1) -> None:
        self.values: dict[int, float] = {}
        self.stop = stop

    def before_step(self) -> None:
        if self.trainer.iter == self.stop:
            raise SystemExit

    def after_step(self) -> None:
        self.values[self.trainer.iter] = self.trainer.storage.history("total_loss").latest()


def _train(
    data: Path, output: Path, *, resume: bool = False, stop: int = -1, **changes: Any
) -> tuple[Trainer, dict[int, float]]:
    trainer = Trainer(config(data, output, **changes))
    losses = Losses(stop)
    trainer.register_hooks([losses])
    trainer.resume_or_load(resume)
    try:
        trainer.train()
    except SystemExit:
        assert stop >= 0
    return trainer, losses.values


def _assert_same_state(left: Trainer, right: Trainer) -> None:
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(left.model.state_dict(), right.model.state_dict(), **exactly)
    for a, b in zip(
        left.optimizer.state_dict()["state"].values(),
        right.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **exactly)
    assert (
        left.optimizer.state_dict()["param_groups"] == right.optimizer.state_dict()["param_groups"]
    )
    assert left.scheduler.state_dict() == right.scheduler.state_dict()


@pytest.mark.parametrize("seed", [7, -1])
def test_resumed_run_equals_an_uninterrupted_one(
    tiny_data: Path, tmp_path: Path, seed: int
) -> None:
    """6 iterations, against a stop in the 5th and a resume from the checkpoint after the 3rd: equal
    to the bit.

    Augmentation and dropout draw random numbers. With SEED -1, the drawn seed is that of the
    resumed run.
    """
    changes = {"MODEL__DETR__DROPOUT": 0.3}
    stopped, before = _train(tiny_data, tmp_path / "b", stop=4, SEED=seed, **changes)
    resumed, after = _train(tiny_data, tmp_path / "b", resume=True, SEED=seed, **changes)
    assert stopped.cfg.SEED == resumed.cfg.SEED >= 0
    assert (list(before), list(after)) == ([0, 1, 2, 3], [3, 4, 5])

    straight, losses = _train(tiny_data, tmp_path / "a", SEED=stopped.cfg.SEED, **changes)
    assert losses == {**before, **after}
    _assert_same_state(straight, resumed)
    other, _ = _train(tiny_data, tmp_path / "c", SEED=stopped.cfg.SEED + 1, **changes)
    assert not torch.equal(other.model.head.weight, straight.model.head.weight)


def test_config_yaml_holds_what_was_resolved(tiny_data: Path, tmp_path: Path) -> None:
    """10 images in batches of 4: 2 iterations an epoch."""
    changes = {"SEED": -1, "SOLVER__EPOCHS": 2, "SOLVER__EPOCH_STEPS": (1,)}
    trainer, losses = _train(tiny_data, tmp_path, **changes)
    assert len(losses) == 4
    cfg = CfgNode.load_cfg((tmp_path / "config.yaml").read_text())
    assert cfg == CfgNode.load_cfg(trainer.cfg.dump())
    assert cfg.SEED >= 0
    assert (cfg.SOLVER.MAX_ITER, list(cfg.SOLVER.STEPS)) == (4, [2])


def test_new_schedule_wins_on_resume(
    tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """STEPS (4,) had lowered the rate; with (7,) it is up again for iteration 6."""
    _train(tiny_data, tmp_path)
    changes = {"SOLVER__MAX_ITER": 8, "SOLVER__STEPS": (7,), "SOLVER__BASE_LR": 0.5}
    trainer, losses = _train(tiny_data, tmp_path, resume=True, **changes)
    assert list(losses) == [6, 7]
    assert "SOLVER.MAX_ITER was 6, is now 8: 8 is used" in log.text
    assert "SOLVER.STEPS was [4], is now [7]: [7] is used" in log.text
    assert "SOLVER.BASE_LR was 0.01, is now 0.5: 0.01 is used" in log.text
    rates = [rate for rate, iteration in trainer.storage.history("lr").values() if iteration > 5]
    assert rates == pytest.approx([0.01, 0.001])


def test_finished_run_is_left_alone(
    tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    changes = {"DATASETS__TEST": ("tiny_val",)}
    trainer, _ = _train(tiny_data, tmp_path, **changes)
    assert "bbox" in trainer._last_eval_results
    metrics = tmp_path / "metrics.json"
    content = metrics.read_text()
    resumed, losses = _train(tiny_data, tmp_path, resume=True, **changes)
    assert "already finished: 6 of 6" in log.text
    assert not losses
    assert not hasattr(resumed, "_last_eval_results")
    assert metrics.read_text() == content


def test_finished_run_without_results_is_evaluated(tiny_data: Path, tmp_path: Path) -> None:
    """As after a kill during the last evaluation."""
    _train(tiny_data, tmp_path)
    resumed, losses = _train(tiny_data, tmp_path, resume=True, DATASETS__TEST=("tiny_val",))
    assert not losses
    assert "bbox" in resumed._last_eval_results
    assert (tmp_path / "inference" / "coco_table.txt").read_text().startswith("tiny_val, bbox")
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [r["iteration"] for r in records if "bbox/AP" in r] == [6]


def test_bfloat16_on_cpu(tiny_data: Path, tmp_path: Path) -> None:
    """Convolutions run in bfloat16: losses near those in float32, not equal to them."""
    changes = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": "bfloat16"}
    trainer, low = _train(tiny_data, tmp_path / "a", SOLVER__MAX_ITER=2, **changes)
    _, full = _train(tiny_data, tmp_path / "b", SOLVER__MAX_ITER=2)
    assert low != full
    torch.testing.assert_close(low[0], full[0], rtol=0.05, atol=0)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not trainer._trainer.grad_scaler.is_enabled()


def test_each_iteration_has_its_own_dropout(tiny_data: Path, tmp_path: Path) -> None:
    """Learning rate 0, all images in each batch, no augmentation: only dropout tells iterations
    apart.
    """
    changes = {
        "SOLVER__BASE_LR": 0.0,
        "SOLVER__IMS_PER_BATCH": 10,
        "SOLVER__MAX_ITER": 4,
        "INPUT__RANDOM_FLIP": "none",
        "INPUT__MIN_SIZE_TRAIN": (24,),
    }
    _, still = _train(tiny_data, tmp_path / "a", MODEL__DETR__DROPOUT=0.0, **changes)
    assert list(still.values()) == pytest.approx([still[0]] * 4, abs=1e-5)
    _, moving = _train(tiny_data, tmp_path / "b", MODEL__DETR__DROPOUT=0.5, **changes)
    assert len({round(loss, 3) for loss in moving.values()}) == 4


def test_steps_at_the_end_are_dropped(tiny_data: Path, tmp_path: Path) -> None:
    """They have no effect, and the scheduler refuses them."""
    trainer = Trainer(config(tiny_data, tmp_path, SOLVER__STEPS=(4, 6, 9)))
    assert tuple(trainer.cfg.SOLVER.STEPS) == (4,)


def test_augmented_results_at_the_end_and_in_evaluation(tiny_data: Path, tmp_path: Path) -> None:
    """One view is the usual evaluation; only the last evaluation of a run has them."""
    changes = {
        "DATASETS__TEST": ("tiny_val",),
        "TEST__EVAL_PERIOD": 3,
        "TEST__AUG__ENABLED": True,
        "TEST__AUG__MIN_SIZES": (24,),
        "TEST__AUG__FLIP": False,
    }
    trainer, _ = _train(tiny_data, tmp_path, **changes)
    results = trainer._last_eval_results
    assert results["bbox_TTA"] == pytest.approx(results["bbox"], nan_ok=True)
    records = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    with_ap = [record for record in records if "bbox/AP" in record]
    assert ["bbox_TTA/AP" in record for record in with_ap] == [False, True]
    assert (tmp_path / "TTA/inference/coco_table.txt").is_file()
    assert (tmp_path / "inference/coco_table.txt").is_file()
    changes["TEST__AUG__FLIP"] = True
    flipped = Trainer.test_with_TTA(config(tiny_data, tmp_path, **changes), trainer.model)
    assert flipped.keys() == {"bbox_TTA"}
