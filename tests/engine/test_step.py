from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from miti_detr.engine import Trainer
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.engine.solver import frozen_norms
from miti_detr.engine.step.train_step import TrainStep
from tests.engine.stub import config


def _step(data: Path, output: Path, amp_dtype: torch.dtype | None) -> TrainStep:
    cfg = config(data, output)
    model = Trainer.build_model(cfg)
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    optimizer = Trainer.build_optimizer(cfg, model)
    loader = Trainer.build_train_loader(cfg)
    guard = NonFiniteGuard(cfg)
    return TrainStep(model, loader, optimizer, seed=7, guard=guard, amp_dtype=amp_dtype)


def test_float16_clips_the_gradients_of_the_loss_itself(tiny_data: Path, tmp_path: Path) -> None:
    """The scale (65536 at first) does not show in the norm, which is near that of float32."""
    norms = []
    for dtype in (torch.float16, None):
        step = _step(tiny_data, tmp_path, dtype)
        before = step.model.head.weight.detach().clone()
        with EventStorage() as storage:
            step.run_step()
        norms.append(storage.history("grad_norm").latest())
        assert not torch.equal(step.model.head.weight, before)
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_scale_is_part_of_the_state(tiny_data: Path, tmp_path: Path) -> None:
    """Between runs with and without a scale, the rest of the state still goes over."""
    half, full = (_step(tiny_data, tmp_path, dtype) for dtype in (torch.float16, None))
    half.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    half.grad_scaler.scale(torch.zeros(()))
    other = _step(tiny_data, tmp_path, torch.float16)
    other.load_state_dict(half.state_dict())
    assert other.grad_scaler.get_scale() == 8.0
    other.load_state_dict(full.state_dict())
    assert other.grad_scaler.get_scale() == 8.0
    full.load_state_dict(half.state_dict())
    assert not full.grad_scaler.is_enabled()


def test_a_frozen_backbone_keeps_its_statistics(tiny_data: Path, tmp_path: Path) -> None:
    """With BACKBONE_MULTIPLIER 0, also after an evaluation; otherwise they follow the batches."""
    for multiplier, same in ((0.0, True), (0.1, False)):
        cfg = config(tiny_data, tmp_path, SOLVER__BACKBONE_MULTIPLIER=multiplier)
        model = Trainer.build_model(cfg)
        norm = torch.nn.BatchNorm2d(4)
        model.backbone = torch.nn.Sequential(model.backbone, norm)
        step = TrainStep(
            model,
            Trainer.build_train_loader(cfg),
            Trainer.build_optimizer(cfg, model),
            seed=7,
            guard=NonFiniteGuard(cfg),
            frozen_norms=frozen_norms(cfg, model),
        )
        model.eval()
        model.train()
        with EventStorage():
            step.run_step()
        assert torch.equal(norm.running_mean, torch.zeros(4)) == same
