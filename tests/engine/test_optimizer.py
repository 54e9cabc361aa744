import math
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from miti_detr.config import add_miti_detr_config
from miti_detr.engine import build_optimizer
from miti_detr.engine.solver import is_backbone
from tests.modeling.deformable.helpers import tiny


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 1)
        self.position_encoding = nn.Embedding(3, 4)
        self.input_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def _cfg(**solver: Any) -> CfgNode:
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.SOLVER.BASE_LR = 1e-3
    cfg.SOLVER.WEIGHT_DECAY = 1e-2
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def _full_model_clip(cfg: CfgNode, value: float) -> CfgNode:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE = True, "full_model", value
    return cfg


def test_two_groups_with_one_weight_decay() -> None:
    """Backbone and position encoding at BASE_LR x 0.1; norms decay like everything else."""
    model = Model()
    optimizer = build_optimizer(_cfg(), model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        group["lr"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
    }
    assert groups == {
        1e-4: {"backbone.weight", "backbone.bias", "position_encoding.weight"},
        1e-3: {"input_proj.weight", "input_proj.bias", "norm.weight", "norm.bias"},
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-2}
    assert type(optimizer) is torch.optim.AdamW


def test_layers_that_choose_places_learn_slowly() -> None:
    """Sampling offsets and reference points of Deformable-DETR at BASE_LR x 0.1, as published."""
    cfg = tiny("base", "SOLVER.BASE_LR", 2e-4, "SOLVER.BACKBONE_MULTIPLIER", 0.1)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    slow = ("backbone.", "sampling_offsets.", "reference_points.")
    for name, parameter in model.named_parameters():
        expected = 2e-5 if any(part in name for part in slow) else 2e-4
        assert rates[id(parameter)] == pytest.approx(expected), name
    assert sum("sampling_offsets" in name for name, _ in model.named_parameters()) == 2 * 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [("backbone.body.stem.conv1.weight", True), ("position_encoding.row_embed.weight", True),
     ("input_proj.weight", False), ("transformer.position_encoding_like", False)],
)  # fmt: skip
def test_backbone_rule(name: str, expected: bool) -> None:
    assert is_backbone(name) is expected


@pytest.mark.parametrize("kind", ["ADAMW", "SGD"])
def test_full_model_clipping_is_one_norm_over_all_parameters(kind: str) -> None:
    """The same as ``clip_grad_norm_`` over all parameters, then a step of the plain optimizer."""
    torch.manual_seed(0)
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    clipped = build_optimizer(_full_model_clip(_cfg(OPTIMIZER=kind), 0.5), model)
    plain = build_optimizer(_cfg(OPTIMIZER=kind), reference)
    gradients = [torch.randn_like(p) for p in model.parameters()]
    for target in (model, reference):
        for p, grad in zip(target.parameters(), gradients, strict=True):
            p.grad = grad.clone() if p.requires_grad else None
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    assert norm > 1
    with EventStorage() as storage:
        clipped.step()
        recorded = storage.history("grad_norm").latest()
    plain.step()
    torch.testing.assert_close(recorded, float(norm), rtol=1e-6, atol=0)
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-8)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-6, atol=1e-8)


def test_clipping_acts_on_unscaled_gradients() -> None:
    """A scaled loss and a GradScaler give the step of the loss itself (a fused optimizer would clip
    first).
    """
    torch.manual_seed(0)
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    inputs = torch.randn(5, 3)
    cfg = _full_model_clip(_cfg(OPTIMIZER="SGD"), 0.1)
    scaled, plain = build_optimizer(cfg, model), build_optimizer(cfg, reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(inputs).square().sum()).backward()
    reference(inputs).square().sum().backward()
    scaler.step(scaled)
    plain.step()
    torch.testing.assert_close(model.weight, reference.weight, rtol=1e-5, atol=1e-7)
    adamw = build_optimizer(_full_model_clip(_cfg(), 0.1), model)
    assert adamw.defaults["fused"]
    assert not adamw._step_supports_amp_scaling  # type: ignore[attr-defined]


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(_full_model_clip(_cfg(), 0.1), model)
    before = model.weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(FloatingPointError, match="norm of the gradients is nan"):
        optimizer.step()
    torch.testing.assert_close(model.weight, before, rtol=0, atol=0)


def test_detectron2_clipping_still_works() -> None:
    cfg = _full_model_clip(_cfg(OPTIMIZER="SGD", MOMENTUM=0.0, WEIGHT_DECAY=0.0), 0.25)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "value"
    model = nn.Linear(2, 1)
    optimizer = build_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    torch.testing.assert_close(model.weight.grad, torch.full((1, 2), 0.25), rtol=0, atol=0)


def test_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER is 'ADAM'; possible: ADAMW, SGD"):
        build_optimizer(_cfg(OPTIMIZER="ADAM"), Model())


def _state(model: nn.Module, **solver: object) -> dict[str, Any]:
    optimizer = build_optimizer(_cfg(**solver), model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def test_state_of_other_shapes_is_refused() -> None:
    """Fused kernels do not look at the shapes and would write outside of the tensors."""
    state = _state(nn.Linear(3, 2))
    build_optimizer(_cfg(), nn.Linear(3, 2)).load_state_dict(state)
    message = r"weight \(2, 3\) in the checkpoint, \(5, 3\) now; bias \(2,\) in"
    with pytest.raises(ValueError, match=message):
        build_optimizer(_cfg(), nn.Linear(3, 5)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has 2 parameters in .* the model has 7 in"):
        build_optimizer(_cfg(), Model()).load_state_dict(state)


def test_state_of_another_optimizer_is_refused() -> None:
    state = _state(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"exp_avg, .* SGD does not use"):
        build_optimizer(_cfg(OPTIMIZER="SGD"), nn.Linear(3, 2)).load_state_dict(state)
    state = _state(nn.Linear(3, 2), OPTIMIZER="SGD")
    with pytest.raises(ValueError, match="momentum_buffer, which AdamW does not use"):
        build_optimizer(_cfg(), nn.Linear(3, 2)).load_state_dict(state)
