"""Steps that are recorded one step late, as on a GPU; here on a CPU."""

import functools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import Tensor

from miti_detr.engine import NonFiniteError, Trainer, replay
from miti_detr.engine import trainer as trainer_module
from miti_detr.engine.hooks import read_records
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.engine.step.prefetch import Prefetcher
from miti_detr.engine.step.train_step import TrainStep
from tests.engine.kills import TIMES
from tests.engine.stub import config
from tests.helpers import tiny_config, training_input


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers are late."""
    step = functools.partial(TrainStep, late=True)
    monkeypatch.setattr(trainer_module, "TrainStep", step)


def _train(data: Path, output: Path, **changes: Any) -> Trainer:
    trainer = Trainer(config(data, output, MODEL__DETR__DROPOUT=0.3, **changes))
    trainer.train()
    return trainer


def _records(folder: Path) -> list[dict[str, Any]]:
    records = read_records(str(folder / "metrics.json"))
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


@pytest.mark.slow
def test_late_steps_change_nothing(
    tiny_data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Weights, and metrics at their iterations, to the bit: of 25 steps, with two evaluations."""
    changes: dict[str, Any] = {"SOLVER__MAX_ITER": 25, "SOLVER__STEPS": (20,)}
    changes |= {"DATASETS__TEST": ("tiny_val",), "TEST__EVAL_PERIOD": 13}
    one = _train(tiny_data, tmp_path / "at_once", **changes)
    request.getfixturevalue("late")
    other = _train(tiny_data, tmp_path / "late", **changes)
    assert (one._trainer.late, other._trainer.late) == (False, True)
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), **exactly)
    assert _records(tmp_path / "late") == _records(tmp_path / "at_once")
    assert [r["iteration"] for r in _records(tmp_path / "late")] == [19, 12, 24, 25]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_weights_stay_until_the_host_knows(tiny_data: Path, tmp_path: Path, fault: str) -> None:
    """A NaN in step 2 is noticed in step 3: the weights are those after step 1, and replayed."""
    good = _train(tiny_data, tmp_path / "good", SOLVER__MAX_ITER=2, SOLVER__STEPS=())
    changes = {"SOLVER__STEPS": (), "SOLVER__CHECKPOINT_PERIOD": 6}
    trainer = Trainer(config(tiny_data, tmp_path, MODEL__DETR__DROPOUT=0.3, **changes))

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        if trainer.iter != 2:
            return output
        return output * math.nan if fault == "loss" else output + (output * 0).sqrt() * 0

    trainer.model.norm.register_forward_hook(spoil)
    message = {"loss": "the loss is not finite", "gradient": "norm of the gradients is nan"}[fault]
    with pytest.raises(NonFiniteError, match=f"{message} at iteration 2"):
        trainer.train()
    assert trainer.iter == 3
    expected = good.model.state_dict()
    torch.testing.assert_close(trainer.model.state_dict(), expected, rtol=0, atol=0)
    for one, two in zip(
        trainer.optimizer.state_dict()["state"].values(),
        good.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    content = torch.load(tmp_path / "nonfinite_iter2_rank0.pth", weights_only=True)
    torch.testing.assert_close(content["model"], expected, rtol=0, atol=0)
    report = replay(tmp_path / "nonfinite_iter2_rank0.pth")
    assert math.isnan(report.recorded_losses["loss_ce"]) == (fault == "loss")
    if fault == "gradient":
        assert report.losses["loss_bbox"] == report.recorded_losses["loss_bbox"]


@pytest.mark.usefixtures("late")
def test_no_checkpoint_of_a_bad_step(tiny_data: Path, tmp_path: Path) -> None:
    """The checkpoint after step 2 waits for its losses."""
    trainer = Trainer(config(tiny_data, tmp_path, SOLVER__CHECKPOINT_PERIOD=3))
    bad = {"loss_bbox": torch.tensor(math.inf, requires_grad=True)}
    trainer.model.register_forward_hook(lambda _m, _i, out: bad if trainer.iter == 2 else out)
    with pytest.raises(NonFiniteError, match="at iteration 2"):
        trainer.train()
    assert not list(tmp_path.glob("model_*.pth"))


@pytest.mark.parametrize("parts", [1, 2])
def test_one_copy_for_the_costs_and_one_for_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """Of a whole step. Each part has its own costs; label bounds are read on the host."""
    cfg = tiny_config("OUTPUT_DIR", str(tmp_path))
    model = build_model(cfg)
    batch = [training_input((48, 64), [[4, 5, 20, 30]], [1], seed) for seed in range(2)]
    optimizer = Trainer.build_optimizer(cfg, model)
    guard = NonFiniteGuard(cfg)
    step = TrainStep(model, [batch] * 3, optimizer, seed=1, guard=guard, parts=parts, late=True)
    calls = Counter[str]()

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(self, *args, **kwargs)

        return call

    with EventStorage() as storage:
        step.run_step()
        for name in ("item", "cpu", "tolist", "__float__", "__bool__", "__int__"):
            monkeypatch.setattr(Tensor, name, counted(name))
        for step.iter in (1, 2):
            calls.clear()
            step.run_step()
            bounds_and_masks = {"__int__": 2 * parts, "__bool__": parts}  # of tensors of the host
            assert calls == {"cpu": parts, "tolist": 1, **bounds_and_masks}
        monkeypatch.undo()
        assert storage.history("total_loss").values()[-1][1] == 1
        step.write_record()
    logged = storage.latest()
    assert {logged[n][1] for n in ("total_loss", "loss_ce_0", "diag/class_error", "grad_norm")} == {
        2
    }
    assert not step._bad


def _loader(batches: list[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def test_prefetching_keeps_order_and_errors() -> None:
    """Fetching twice is fetching once; an error comes with the batch that it is of."""
    first, second = [{"image": torch.zeros(3, 2, 2)}], [{"image": torch.ones(3, 2, 2)}]
    batches = Prefetcher(_loader([first, second, OSError("cut")]), torch.device("cpu"))
    assert next(batches) is first
    batches.fetch()
    batches.fetch()
    assert next(batches) is second
    batches.fetch()
    with pytest.raises(OSError, match="cut"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)
