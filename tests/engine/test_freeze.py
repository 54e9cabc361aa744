"""Parts of the model that are not trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from miti_detr.engine import Trainer
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.engine.optimizer import build_optimizer
from miti_detr.engine.solver import freeze, frozen_norms
from miti_detr.engine.step.train_step import TrainStep
from tests.engine.stub import config
from tests.helpers import build_on_meta, tiny_config, training_input


@pytest.mark.slow
def test_frozen_parts_stay(tmp_path: Path) -> None:
    """Weights and statistics of a backbone with batch norms and of the encoder, to the bit, also
    after an evaluation; everything else changes.
    """
    frozen = ("backbone", "transformer.encoder")
    cfg = tiny_config(
        "MODEL.RESNETS.NORM", "BN", "SOLVER.FREEZE", frozen, "OUTPUT_DIR", str(tmp_path)
    )
    model = build_model(cfg)
    freeze(cfg, model)
    norms = frozen_norms(cfg, model)
    assert norms
    batch = [training_input((48, 64), [[4, 5, 20, 30]], [1], seed) for seed in range(2)]
    step = TrainStep(
        model,
        [batch] * 2,
        build_optimizer(cfg, model),
        seed=1,
        guard=NonFiniteGuard(cfg),
        frozen_norms=norms,
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with EventStorage():
        step.run_step()
        model.eval()
        model.train()
        step.run_step()
    same = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert same == {name for name in before if name.startswith(frozen)}
    optimized = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in optimized}
    assert names == {n for n, _ in model.named_parameters() if not n.startswith(frozen)}


def test_counts_are_logged(log: pytest.LogCaptureFixture) -> None:
    """class_embed of width 32 has 33 weights for each of 3 classes and "no object"."""
    cfg = tiny_config("SOLVER.FREEZE", ("class_embed",))
    model = build_on_meta(cfg)
    whole = sum(p.numel() for p in model.parameters())
    freeze(cfg, model)
    assert "SOLVER.FREEZE class_embed: 132 weights do not change" in log.text
    assert f"{whole - 132:,} of {whole:,} weights are trained" in log.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("transformer.encodr",), r"'transformer.encodr', which .* there are transformer.encoder"),
        (("trans",), r"'trans', which has no weights"),
        (("zzz",), r"there are backbone, bbox_embed, class_embed"),
    ],
)
def test_names_that_are_no_parts(names: tuple[str, ...], message: str) -> None:
    cfg = tiny_config("SOLVER.FREEZE", names)
    with pytest.raises(ValueError, match=message):
        freeze(cfg, build_on_meta(cfg))


def test_something_is_left_to_train() -> None:
    cfg = tiny_config("SOLVER.FREEZE", ("a",))
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"\('a',\) leaves nothing to train"):
        freeze(cfg, model)


def test_a_run_with_averages_and_frozen_parts(tiny_data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"SOLVER__FREEZE": ("backbone",), "SOLVER__EMA__ENABLED": True}
    trainer = Trainer(config(tiny_data, tmp_path, **changes))
    before = trainer.model.backbone.weight.detach().clone()
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert torch.equal(saved["model"]["backbone.weight"], before)
    names = saved["trainer"]["average"]["weights"].keys()
    assert names == {n for n in saved["model"] if not n.startswith("backbone")}
