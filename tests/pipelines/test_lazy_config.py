"""A user of ``LazyConfig``: only constructor arguments, no ``cfg`` anywhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer

from miti_detr.checkpoint import CheckpointError
from tests.helpers import training_input

CONFIG = """
from detectron2.config import LazyCall as L
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
import torch

from miti_detr.layers import build_position_encoding
from miti_detr.modeling import (
    HungarianMatcher, MaskedBackbone, MitiDetr, ResidualTransformer, SetCriterion,
)

model = L(MitiDetr)(
    backbone=L(MaskedBackbone)(
        body=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="FrozenBN"),
            out_features=["res3"],
        ),
    ),
    position_encoding=L(build_position_encoding)(name="sine", d_model="${..transformer.d_model}"),
    transformer=L(ResidualTransformer)(
        d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=64,
        dropout=0.1, pre_norm=False, layer_residual="before_norm",
    ),
    criterion=L(SetCriterion)(num_classes="${..num_classes}", matcher=L(HungarianMatcher)()),
    num_classes=3,
    num_queries=7,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
)
optimizer = L(torch.optim.AdamW)(lr=1e-4)
"""


@pytest.fixture
def cfg(tmp_path: Path) -> Any:
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return LazyConfig.load(str(path))


@pytest.mark.slow
def test_model_trains_and_its_checkpoint_knows_its_variant(cfg: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = instantiate(cfg.model).train()
    known = {"layer_residual": "before_norm", "pre_norm": False, "nheads": 2, "num_classes": 3}
    assert known.items() <= model.variant.items()
    cfg.optimizer.params = model.parameters()
    batch = [training_input((48, 64), [[4, 5, 20, 30]], [1])]
    trainer = SimpleTrainer(model, [batch] * 2, instantiate(cfg.optimizer))
    before = model.class_embed.weight.detach().clone()
    trainer.train(0, 2)
    assert (model.class_embed.weight - before).abs().max() > 0

    DetectionCheckpointer(model, str(tmp_path)).save("lazy")
    same = instantiate(cfg.model).eval()
    DetectionCheckpointer(same).load(str(tmp_path / "lazy.pth"))
    torch.testing.assert_close(same.class_embed.weight, model.class_embed.weight, rtol=0, atol=0)
    cfg.model.transformer.layer_residual = "none"
    other = instantiate(cfg.model)
    DetectionCheckpointer(other).load(str(tmp_path / "lazy.pth"))
    with pytest.raises(CheckpointError, match=r"these are Miti-DETR.*the model is DETR"):
        other.eval()(batch)


def test_overrides_on_the_command_line(cfg: Any) -> None:
    cfg = LazyConfig.apply_overrides(
        cfg, ["model.num_classes=5", "model.transformer.layer_residual=after_norm"]
    )
    model = instantiate(cfg.model)
    assert model.class_embed.out_features == 6
    assert model.variant["layer_residual"] == "after_norm"
