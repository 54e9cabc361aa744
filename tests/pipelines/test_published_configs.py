"""The YAML files of the published Detectron2 wrapper of DETR, one key changed."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks

from miti_detr.engine import build_optimizer, setup_config
from miti_detr.modeling import MitiDetr
from tests.helpers import training_input

CONFIGS = Path(__file__).parent / "configs"
OURS = ("MODEL.META_ARCHITECTURE", "MitiDetr")


def published(name: str, *overrides: str) -> CfgNode:
    return setup_config(str(CONFIGS / name), [*OURS, "MODEL.DEVICE", "cpu", *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["none", ""])
def test_boxes(residual: str) -> None:
    """A step of the whole R50 model. Without a word on LAYER_RESIDUAL it is a Miti-DETR."""
    options = ("MODEL.DETR.LAYER_RESIDUAL", residual) if residual else ()
    cfg = published("detr_256_6_6_torchvision.yaml", *options)
    model = build_model(cfg).train()
    assert isinstance(model, MitiDetr)
    assert model.variant["layer_residual"] == (residual or "before_norm")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_299_541
    optimizer = build_optimizer(cfg, model)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-4, 1e-5}
    losses = model([training_input((64, 64), [[4, 5, 20, 30]], [17])])
    assert len(losses) == 3 * 6
    total = sum(losses.values())
    assert isinstance(total, torch.Tensor)
    total.backward()
    before = model.class_embed.weight.detach().clone()
    optimizer.step()
    assert 0 < (model.class_embed.weight - before).abs().max() < 2e-4


@pytest.mark.slow
def test_masks(tmp_path: Path) -> None:
    """A step of the mask head on a frozen detector, which MODEL.WEIGHTS does not override."""
    detector = build_model(published("detr_256_6_6_torchvision.yaml"))
    torch.save({"model": detector.state_dict()}, tmp_path / "detr.pth")
    cfg = published(
        "detr_segm_256_6_6_torchvision.yaml",
        *("MODEL.DETR.FROZEN_WEIGHTS", str(tmp_path / "detr.pth")),
        *("MODEL.DETR.WEIGHTS_RESIDUAL", "before_norm"),
    )
    model = build_model(cfg).train()
    assert isinstance(model, MitiDetr)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_333_657
    item = training_input((64, 64), [[4, 5, 20, 30]], [17])
    item["instances"].gt_masks = BitMasks(torch.ones(1, 64, 64))
    losses = model([item])
    assert {"loss_mask", "loss_dice"} <= set(losses)
    sum(losses.values()).backward()
    assert build_optimizer(cfg, model).param_groups[0]["lr"] == 1e-4
    for key, value in detector.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
