import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miti_detr.engine import NonFiniteError, Trainer, replay
from tests.engine.stub import TinyDetector, config


def _stop(trainer: Trainer) -> tuple[str, Path]:
    """Train until the guard stops the run; the message and the replay file."""
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    (path,) = Path(trainer.cfg.OUTPUT_DIR).glob("nonfinite_iter*_rank0.pth")
    return str(caught.value), path


def _break_norm_at(trainer: Trainer, iteration: int) -> None:
    """Put a NaN into the weights when a step begins."""

    def poison(module: TinyDetector, _: object) -> None:
        if trainer.iter == iteration:
            module.norm.weight.data[1] = math.nan

    trainer.model.register_forward_pre_hook(poison)


def test_stops_before_the_weights_change(tiny_data: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(tiny_data, tmp_path, MODEL__DETR__DROPOUT=0.3))
    _break_norm_at(trainer, 2)
    message, path = _stop(trainer)
    assert path.name == "nonfinite_iter2_rank0.pth"
    assert "iteration 2, rank 0" in message
    assert "loss_ce: nan" in message
    assert "loss_bbox: nan" in message
    assert message.count(".png") == 4
    assert str(path) in message
    assert torch.isfinite(trainer.model.head.weight).all()

    content = torch.load(path, weights_only=True)
    assert [Path(x["file_name"]).suffix for x in content["batch"]] == [".png"] * 4
    assert content["batch"][0]["image"].dtype == torch.uint8

    report = replay(path)
    assert (report.iteration, report.rank, report.seed) == (2, 0, 7)
    assert report.parameter == "norm.weight"
    assert report.module == "norm"
    assert report.gradient is not None
    assert report.file_names == [x["file_name"] for x in content["batch"]]
    assert "first module with an output that is not finite: norm" in str(report)


def test_replay_repeats_the_step_exactly(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that overflows in one step; without the fault, the replay has its other loss to the
    bit.

    Dropout and the data read in this process draw random numbers before the forward pass.
    """
    trainer = Trainer(config(tiny_data, tmp_path, MODEL__DETR__DROPOUT=0.3))
    losses = TinyDetector._losses

    def overflow(self: TinyDetector, output: Tensor, instances: object) -> dict[str, Tensor]:
        result = losses(self, output, instances)  # type: ignore[arg-type]
        if trainer.iter == 3:
            result["loss_bbox"] = result["loss_bbox"] * math.inf
        return result

    monkeypatch.setattr(TinyDetector, "_losses", overflow)
    message, path = _stop(trainer)
    assert "loss_bbox: inf" in message
    monkeypatch.setattr(TinyDetector, "_losses", losses)
    report = replay(path)
    assert report.recorded_losses["loss_bbox"] == math.inf
    assert report.losses["loss_ce"] == report.recorded_losses["loss_ce"]
    assert (report.parameter, report.module, report.gradient) == (None, None, None)


def test_gradient_that_is_not_finite(tiny_data: Path, tmp_path: Path) -> None:
    """d sqrt(0) = inf, and inf * 0 = nan, while the loss is finite; the clipping notices."""
    trainer = Trainer(config(tiny_data, tmp_path))
    trainer.model.norm.register_forward_hook(lambda _m, _i, out: out + (out * 0).sqrt() * 0)
    message, path = _stop(trainer)
    assert "the norm of the gradients is nan at iteration 0" in message
    assert path.is_file()


def test_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=r"model.pth is not a replay file.* no int called iter"):
        replay(path)
    for content in (b"", b"text", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.pth is not a replay file"):
            replay(path)
    with pytest.raises(FileNotFoundError):
        replay(tmp_path / "none.pth")
