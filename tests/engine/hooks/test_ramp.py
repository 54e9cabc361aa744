"""Warm start of a Miti-DETR from DETR's weights: the ramp of the layer residual."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from torch import nn

import train_net
from miti_detr.checkpoint import CheckpointError, MitiDetrCheckpointer
from miti_detr.engine import ResidualRamp, Trainer, replay, run, setup_config
from miti_detr.engine.hooks.nonfinite import NonFiniteError
from miti_detr.engine.predictor import Predictor, load_config
from tests.engine.stub import config, options
from tests.engine.test_trainer import Losses, _assert_same_state
from tests.helpers import ROOT, training_input

RESIDUAL = "MODEL__DETR__LAYER_RESIDUAL"
RAMP = "MODEL__DETR__RESIDUAL_RAMP_ITERS"


CONFIG = str(ROOT / "configs/shapes/miti_detr.yaml")


def detector_options(data: Path, output: Path, **changes: Any) -> list[str]:
    """Overrides for a tiny MitiDetr on the tiny data; ``changes``: keys with __ for dots."""
    size = {"HIDDEN_DIM": 16, "NHEADS": 2, "DIM_FEEDFORWARD": 32, "NUM_OBJECT_QUERIES": 4}
    values = {
        "MODEL__META_ARCHITECTURE": "MitiDetr",
        "MODEL__DETR__SIZE_DIVISIBILITY": 0,
        "MODEL__DETR__DROPOUT": 0.1,
        **{f"MODEL__DETR__{key}": value for key, value in size.items()},
        "SOLVER__BASE_LR": 0.001,
        "TEST__EVAL_PERIOD": 0,
        **changes,
    }
    return options(data, output, **values)


def detector_config(data: Path, output: Path, **changes: Any) -> CfgNode:
    """The config of :func:`detector_options`."""
    return setup_config(CONFIG, detector_options(data, output, **changes))


def train(cfg: CfgNode, *, resume: bool = False, stop: int = -1) -> tuple[Trainer, dict]:
    trainer, losses = Trainer(cfg), Losses(stop)
    trainer.register_hooks([losses])
    trainer.resume_or_load(resume)
    try:
        trainer.train()
    except SystemExit:
        assert stop >= 0
    return trainer, losses.values


@pytest.fixture(scope="module")
def detr(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of a DETR after two steps."""
    folder = tmp_path_factory.mktemp("detr")
    train(detector_config(tiny_data, folder, **{RESIDUAL: "none", "SOLVER__MAX_ITER": 2}))
    return str(folder / "model_final.pth")


@pytest.fixture(scope="module")
def ramped(
    detr: str, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, float]]:
    """A run of 6 steps with a ramp over 4, checkpoint each 3; and its losses."""
    folder = tmp_path_factory.mktemp("ramped")
    _, losses = train(detector_config(tiny_data, folder, MODEL__WEIGHTS=detr, **{RAMP: 4}))
    return folder, losses


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["before_norm", "after_norm"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_first_loss_is_that_of_detr(
    detr: str, tiny_data: Path, tmp_path: Path, residual: str, pre_norm: bool
) -> None:
    """Equal to 1e-6 with the ramp; without it, another loss; and the second step differs."""
    changes: dict[str, Any] = {"SOLVER__MAX_ITER": 2, "MODEL__WEIGHTS": detr}
    if pre_norm:
        changes |= {"MODEL__DETR__PRE_NORM": True, "MODEL__WEIGHTS": ""}
    _, plain = train(detector_config(tiny_data, tmp_path / "d", **{RESIDUAL: "none"}, **changes))
    _, ramp = train(
        detector_config(tiny_data, tmp_path / "r", **{RESIDUAL: residual, RAMP: 2}, **changes)
    )
    _, miti = train(detector_config(tiny_data, tmp_path / "m", **{RESIDUAL: residual}, **changes))
    torch.testing.assert_close(ramp[0], plain[0], rtol=0, atol=1e-6)
    assert abs(miti[0] - plain[0]) > 1e-3
    assert abs(ramp[1] - plain[1]) > 1e-4


def test_evaluation_of_the_detr_is_refused_with_two_ways_on(
    detr: str,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``train_net.py --eval-only``: one line; the ramp changes nothing about it; each way works."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}

    def evaluate(**changes: Any) -> int:
        changes |= {"MODEL__WEIGHTS": detr, "DATASETS__TEST": ("tiny_val",)}
        opts = detector_options(tiny_data, tmp_path, **changes)
        return run(
            train_net.main,
            argparse.Namespace(
                config_file=CONFIG, opts=opts, eval_only=True, resume=False, **arguments
            ),
        )

    assert evaluate(**{RAMP: 4}) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {detr}: these are DETR")
    assert "MODEL.DETR.LAYER_RESIDUAL none" in error
    assert "state MODEL.DETR.WEIGHTS_RESIDUAL before_norm" in error
    assert evaluate(**{RESIDUAL: "none"}) == 0
    assert evaluate(MODEL__DETR__WEIGHTS_RESIDUAL="before_norm") == 0


@pytest.mark.slow
def test_strength_is_a_function_of_the_iteration(tiny_data: Path, tmp_path: Path) -> None:
    seen = []

    class Look(Losses):
        def before_step(self) -> None:
            seen.append(self.trainer.model.residual_strength)

    trainer = Trainer(detector_config(tiny_data, tmp_path, **{RAMP: 4}))
    trainer.register_hooks([Look()])
    trainer.train()
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.slow
def test_resume_in_the_ramp_is_exact(
    ramped: tuple[Path, dict], detr: str, tiny_data: Path, tmp_path: Path
) -> None:
    folder, losses = ramped
    cfg = detector_config(tiny_data, tmp_path, MODEL__WEIGHTS=detr, **{RAMP: 4})
    _, before = train(cfg, stop=4)
    resumed, after = train(cfg, resume=True)
    assert {**before, **after} == losses
    straight = Trainer(detector_config(tiny_data, folder, **{RAMP: 4}))
    straight.resume_or_load(resume=True)
    _assert_same_state(straight, resumed)


@pytest.mark.parametrize("checkpointer", [MitiDetrCheckpointer, DetectionCheckpointer])
def test_checkpoint_of_the_middle_computes_what_was_trained(
    ramped: tuple[Path, dict],
    tiny_data: Path,
    tmp_path: Path,
    checkpointer: type[DetectionCheckpointer],
    log: pytest.LogCaptureFixture,
) -> None:
    """After step 2 the strength is 2/4, in the record, in the loaded model and in the log."""
    path = str(ramped[0] / "model_0000002.pth")
    assert torch.load(path, weights_only=True)["miti_detr"]["residual_strength"] == 0.5
    model = build_model(detector_config(tiny_data, tmp_path)).eval()
    checkpointer(model).load(path)
    assert model.residual_strength == 0.5
    assert "from the middle of a ramp: the layer residual has strength 0.5" in log.text
    inputs = [training_input((24, 32), [], [])]
    middle = model.predict(inputs).logits
    model.residual_strength = 1.0
    assert (middle - model.predict(inputs).logits).abs().max() > 1e-3

    final = str(ramped[0] / "model_final.pth")
    assert "residual_strength" not in torch.load(final, weights_only=True)["miti_detr"]
    model.residual_strength = 0.5
    checkpointer(model).load(final)
    assert model.residual_strength == 1.0


def test_predictor_needs_the_file_alone(ramped: tuple[Path, dict]) -> None:
    cfg = load_config(weights=str(ramped[0] / "model_0000002.pth"))
    assert Predictor(cfg).model.residual_strength == 0.5


def test_training_without_a_ramp_is_at_full_strength(
    ramped: tuple[Path, dict], tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    weights = str(ramped[0] / "model_0000002.pth")
    changes = {"MODEL__WEIGHTS": weights, "SOLVER__MAX_ITER": 1}
    trainer, _ = train(detector_config(tiny_data, tmp_path, **changes))
    assert trainer.model.residual_strength == 1
    assert "had strength 0.5 in the weights; it is now 1" in log.text


@pytest.mark.slow
def test_replay_has_the_strength_of_the_step(tiny_data: Path, tmp_path: Path) -> None:
    """A weight that is no number stops step 1 of 2; the saved model knows its strength 1/2."""
    trainer = Trainer(detector_config(tiny_data, tmp_path, **{RAMP: 2}))

    class Spoil(Losses):
        def before_step(self) -> None:
            if self.trainer.iter == 1:
                nn.init.constant_(self.trainer.model.class_embed.bias, float("nan"))

    trainer.register_hooks([Spoil()])
    with pytest.raises(NonFiniteError):
        trainer.train()
    path = tmp_path / "nonfinite_iter1_rank0.pth"
    assert replay(path).parameter == "class_embed.bias"
    state = torch.load(path, weights_only=True)["model"]
    model = build_model(detector_config(tiny_data, tmp_path))
    model.load_state_dict(state)
    assert model.residual_strength == 0.5


def test_stock_trainer_takes_the_hook(tiny_data: Path, tmp_path: Path) -> None:
    cfg = detector_config(
        *(tiny_data, tmp_path),
        SOLVER__MAX_ITER=2,
        SOLVER__STEPS=(),
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE="norm",
    )
    trainer = DefaultTrainer(cfg)
    trainer.register_hooks([ResidualRamp(4)])
    trainer.train()
    assert trainer.model.residual_strength == 0.25


def test_bad_values_are_named(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RESIDUAL_RAMP_ITERS is -1; it must be an integer from 0"):
        detector_config(tiny_data, tmp_path, **{RAMP: -1})
    with pytest.raises(ValueError, match="4, but TinyDetector has no layer residual"):
        Trainer(config(tiny_data, tmp_path, **{RAMP: 4})).train()
    model = build_model(detector_config(tiny_data, tmp_path))
    with pytest.raises(ValueError, match="residual_strength 2 is not between 0 and 1"):
        model.residual_strength = 2


def test_other_formats_cannot_say_it(ramped: tuple[Path, dict], tmp_path: Path) -> None:
    from miti_detr.checkpoint.export import convert_file

    path, target = str(ramped[0] / "model_0000002.pth"), tmp_path / "out.pth"
    with pytest.raises(CheckpointError, match=r"strength 0\.5 in these weights, which detr cannot"):
        convert_file(path, str(target), "detr")
    assert not target.exists()
    convert_file(path, str(target), "ours")
    assert torch.load(target, weights_only=True)["miti_detr"]["residual_strength"] == 0.5


def test_detr_has_nothing_to_ramp(tiny_data: Path, tmp_path: Path) -> None:
    model = build_model(detector_config(tiny_data, tmp_path, **{RESIDUAL: "none"}))
    model.residual_strength = 0.5
    assert model.residual_strength == 1.0
