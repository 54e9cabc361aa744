"""One step of a batch that comes in parts is that of the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from miti_detr.engine import NonFiniteError, Trainer, replay
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.engine.step.train_step import TrainStep
from tests.engine.stub import TinyDetector, config
from tests.helpers import tiny_config, training_input

# Objects of each image: parts of any length have other numbers of objects than their share
COUNTS = (0, 3, 1, 9, 2, 0, 5, 1)
KEYS = ("MODEL.DETR.DROPOUT", 0.0, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DETR.NUM_CLASSES", 2)


def _batch(size: tuple[int, int] = (48, 64)) -> list[dict[str, Any]]:
    batch = []
    for seed, count in enumerate(COUNTS):
        boxes = [[2.0 + 4 * i, 3.0 + seed, 20.0 + 4 * i, 30.0 + seed] for i in range(count)]
        item = training_input(size, boxes, [i % 2 for i in range(count)], seed)
        item["image_id"] = seed
        batch.append(item)
    return batch


def _step(cfg: Any, weights: dict[str, Any], parts: int) -> tuple[TrainStep, dict[str, float]]:
    """A step of stochastic gradient descent in float64, and what it logs."""
    model = build_model(cfg).double()
    model.load_state_dict(weights)
    optimizer = Trainer.build_optimizer(cfg, model)
    guard = NonFiniteGuard(cfg)
    step = TrainStep(model, [_batch()], optimizer, seed=1, guard=guard, parts=parts)
    with EventStorage() as storage:
        step.run_step()
    return step, {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.slow
def test_parts_make_the_step_of_the_whole_batch() -> None:
    """Losses, gradients, their norm and the new weights, to 1e-9; 9 objects for 7 queries."""
    clip = ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.05, "SOLVER.OPTIMIZER", "SGD")
    cfg = tiny_config(*KEYS, *clip)
    weights = build_model(cfg).state_dict()
    whole, logged = _step(cfg, weights, 1)
    names = [name for name in logged if name.startswith("loss_") or name == "total_loss"]
    assert logged["grad_norm"] > 0.05
    for parts in (2, 3, 8):
        step, found = _step(cfg, weights, parts)
        for name in (*names, "grad_norm"):
            assert found[name] == pytest.approx(logged[name], rel=1e-9), name
        for one, other in zip(step.model.parameters(), whole.model.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_losses_of_other_models_are_means_over_images(tiny_data: Path, tmp_path: Path) -> None:
    """Batches of 4 and 2 + 2 images, no augmentation: the same weights after two steps."""
    changes = {"INPUT__RANDOM_FLIP": "none", "INPUT__MIN_SIZE_TRAIN": (24,), "SOLVER__STEPS": ()}
    changes |= {"MODEL__DETR__DROPOUT": 0.0, "SOLVER__MAX_ITER": 2, "SOLVER__OPTIMIZER": "SGD"}
    weights = []
    for parts in (1, 2):
        output = tmp_path / str(parts)
        trainer = Trainer(config(tiny_data, output, **changes, SOLVER__ACCUMULATE=parts))
        trainer.train()
        weights.append(trainer.model.state_dict())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-7)


def test_a_part_is_replayed_as_it_was(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second part fails; without the fault, the replay has its other loss to the bit."""
    changes = {"MODEL__DETR__DROPOUT": 0.3, "SOLVER__ACCUMULATE": 2}
    trainer = Trainer(config(tiny_data, tmp_path, **changes))
    losses, calls = TinyDetector._losses, [0]

    def overflow(self: TinyDetector, output: Any, instances: Any) -> Any:
        calls[0] += 1
        result = losses(self, output, instances)
        return {**result, "loss_bbox": result["loss_bbox"] * (torch.inf if calls[0] == 7 else 1)}

    before = trainer.model.head.weight.detach().clone()
    monkeypatch.setattr(TinyDetector, "_losses", overflow)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    monkeypatch.setattr(TinyDetector, "_losses", losses)
    assert "at iteration 1, rank 0" in str(caught.value)
    assert not torch.equal(trainer.model.head.weight, before)  # of iteration 0
    report = replay(tmp_path / "nonfinite_iter1_rank0.pth")
    assert len(report.file_names) == 2
    assert report.recorded_losses["loss_bbox"] == torch.inf
    assert report.losses["loss_ce"] == report.recorded_losses["loss_ce"]


@pytest.mark.parametrize("parts", [3, 8])
def test_parts_are_equal(tiny_data: Path, tmp_path: Path, parts: int) -> None:
    with pytest.raises(ValueError, match=rf"SOLVER.ACCUMULATE is {parts}.* 4 images.* divisor"):
        config(tiny_data, tmp_path, SOLVER__ACCUMULATE=parts)
