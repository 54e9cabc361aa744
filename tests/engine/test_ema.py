"""The average of the weights: its formula, what it holds, and who uses it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.checkpoint.export import convert_file
from miti_detr.engine import Trainer
from miti_detr.engine.checkpointers import RunCheckpointer
from miti_detr.engine.solver.ema import WeightAverage
from tests.engine.stub import config
from tests.helpers import tiny_config

EMA = {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.6, "SOLVER__EMA__WARMUP": 2}
EXACTLY = {"rtol": 0, "atol": 0}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("passing", torch.ones(2), persistent=False)


def _shift(model: nn.Module, by: float) -> None:
    """As a step would do."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(int(by) if not tensor.is_floating_point() else by)


@pytest.mark.parametrize(("warmup", "period"), [(0, 1), (3, 1), (3, 2)])
def test_formula(warmup: int, period: int) -> None:
    """a_t = d_t^n a_(t-n) + (1 - d_t^n) w_t with d_t = .9 (1 - exp(-t / warmup)), every n steps.

    Parameters, and buffers of floating point; neither frozen ones nor counters nor buffers that are
    not saved.
    """
    model = Model().double()
    average = WeightAverage(model, decay=0.9, warmup=warmup, period=period)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(1, 7):
        _shift(model, step)
        average.update()
        if step % period == 0:
            d = (0.9 * (1 - math.exp(-step / warmup) if warmup else 1.0)) ** period
            for name, weight in model.state_dict().items():
                expected[name] = d * expected[name] + (1 - d) * weight
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with average.in_model():
        found = model.state_dict()
        for name in ("conv.weight", "conv.bias", "norm.weight", "norm.running_var"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)
        for name in ("frozen.weight", "norm.num_batches_tracked"):
            torch.testing.assert_close(found[name], before[name], **EXACTLY)
        assert found["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dict(model.state_dict()), before, **EXACTLY)
    assert "passing" not in average.state_dict()["averages"]


class Weights(HookBase):
    """Copies the weights after every step."""

    def __init__(self) -> None:
        self.copies: list[dict[str, Tensor]] = []

    def after_step(self) -> None:
        state = self.trainer.model.state_dict()
        self.copies.append({k: v.clone() for k, v in state.items()})


class Watching(Trainer):
    """Keeps the weights that it evaluates."""

    evaluated: list[dict[str, Tensor]] = []

    @classmethod
    def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> Any:
        cls.evaluated.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"bbox": {"AP": float(len(cls.evaluated))}}


def test_evaluation_and_checkpoints_use_the_average(tiny_data: Path, tmp_path: Path) -> None:
    """By hand from the weights of each step; training itself does not change."""
    changes: dict[str, Any] = {"SOLVER__MAX_ITER": 4, "SOLVER__STEPS": (), "TEST__EVAL_PERIOD": 2}
    changes |= {"DATASETS__TEST": ("tiny_val",), "SOLVER__CHECKPOINT_PERIOD": 2}
    plain = Trainer(config(tiny_data, tmp_path / "plain", **{**changes, "TEST__EVAL_PERIOD": 0}))
    plain.test = lambda *_: {}  # type: ignore[method-assign, assignment]
    plain.train()
    trainer = Watching(config(tiny_data, tmp_path, **changes, **EMA))
    expected = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    weights = Weights()
    trainer.register_hooks([weights])
    Watching.evaluated.clear()
    trainer.train()
    torch.testing.assert_close(trainer.model.state_dict(), plain.model.state_dict(), **EXACTLY)
    averages = []
    for step, copy in enumerate(weights.copies, start=1):
        d = 0.6 * (1 - math.exp(-step / 2))
        expected = {k: d * v + (1 - d) * copy[k] for k, v in expected.items()}
        averages.append(expected)
    first, last = Watching.evaluated
    torch.testing.assert_close(first, averages[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(last, averages[3], rtol=1e-5, atol=1e-7)
    for name, state in (("0000001", first), ("final", last), ("best", last)):
        saved = torch.load(tmp_path / f"model_{name}.pth", weights_only=True)
        torch.testing.assert_close(saved["model"], state, **EXACTLY)
    last_weights = torch.load(tmp_path / "model_final.pth", weights_only=True)["trainer"]
    torch.testing.assert_close(last_weights["average"]["weights"], weights.copies[3], **EXACTLY)


def _train(data: Path, output: Path, stop: int, *, resume: bool = False, **more: Any) -> Trainer:
    trainer = Trainer(config(data, output, MODEL__DETR__DROPOUT=0.3, **{**EMA, **more}))
    trainer.resume_or_load(resume)
    trainer.max_iter = stop
    trainer.train()
    return trainer


def test_resumed_average_is_equal_to_the_bit(tiny_data: Path, tmp_path: Path) -> None:
    """From a checkpoint between two updates of the average."""
    more = {"SOLVER__EMA__PERIOD": 2, "SOLVER__ACCUMULATE": 2}
    straight = _train(tiny_data, tmp_path / "a", 6, **more)
    _train(tiny_data, tmp_path / "b", 5, **more)
    (tmp_path / "b" / "last_checkpoint").write_text("model_0000002.pth")
    resumed = _train(tiny_data, tmp_path / "b", 6, resume=True, **more)
    assert resumed.start_iter == 3
    torch.testing.assert_close(resumed.state_dict()["average"], straight.state_dict()["average"])
    states = [torch.load(tmp_path / x / "model_final.pth", weights_only=True) for x in "ab"]
    torch.testing.assert_close(states[0]["model"], states[1]["model"], **EXACTLY)
    one, other = (state["trainer"]["average"] for state in states)
    torch.testing.assert_close(one, other, **EXACTLY)
    torch.testing.assert_close(dict(resumed.model.state_dict()), one["weights"], **EXACTLY)


def test_switched_on_and_off_at_a_resume(tiny_data: Path, tmp_path: Path) -> None:
    _train(tiny_data, tmp_path, 3, SOLVER__EMA__ENABLED=False)
    begun = Trainer(config(tiny_data, tmp_path, **EMA))
    begun.resume_or_load()
    state = begun.state_dict()["average"]
    assert state["steps"] == 0
    torch.testing.assert_close(state["averages"], dict(begun.model.state_dict()), **EXACTLY)
    _train(tiny_data, tmp_path, 6, resume=True)
    with pytest.raises(ValueError, match=r"SOLVER.EMA.ENABLED is False, but the checkpoint has"):
        Trainer(config(tiny_data, tmp_path)).resume_or_load()


def test_files_say_that_their_weights_are_averages(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Wherever they are loaded or converted; a model that trains on does not keep it."""
    cfg = tiny_config("OUTPUT_DIR", str(tmp_path))
    model = build_model(cfg)
    average = WeightAverage(model, decay=0.5)
    _shift(model, 1.0)
    average.update()
    RunCheckpointer(model, str(tmp_path), average=average, cfg=cfg).save("a")
    message = "EMA of the weights of 1 steps, decay 0.5"
    other = build_model(cfg)
    MitiDetrCheckpointer(other, cfg=cfg).load(str(tmp_path / "a.pth"))
    assert f"a.pth: {message}" in log.text
    with average.in_model():
        torch.testing.assert_close(other.state_dict(), model.state_dict(), **EXACTLY)
    lines = convert_file(str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "ours")
    assert message in lines
    converted = torch.load(tmp_path / "b.pth", weights_only=True)
    assert converted["miti_detr"]["weights_average"] == message
    MitiDetrCheckpointer(other, str(tmp_path), cfg=cfg).save("c")
    assert "weights_average" not in torch.load(tmp_path / "c.pth", weights_only=True)["miti_detr"]
