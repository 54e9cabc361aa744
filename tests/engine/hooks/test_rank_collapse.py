"""Rank collapse logged during training, which it does not touch."""

import json
from pathlib import Path

import pytest
import torch

from miti_detr.engine import RankHook, Trainer
from miti_detr.rank import measure_rank
from tests.engine.stub import config

SMALL = {
    "MODEL__META_ARCHITECTURE": "MitiDetr",
    "MODEL__BACKBONE__NAME": "build_detr_resnet_backbone",
    "MODEL__BACKBONE__FREEZE_AT": 0,
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__NORM": "naiveSyncBN",
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 8,
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 8,
    "MODEL__RESNETS__OUT_FEATURES": ["res3"],
    "MODEL__DETR__HIDDEN_DIM": 16,
    "MODEL__DETR__NHEADS": 2,
    "MODEL__DETR__ENC_LAYERS": 1,
    "MODEL__DETR__DEC_LAYERS": 2,
    "MODEL__DETR__DIM_FEEDFORWARD": 16,
    "MODEL__DETR__NUM_OBJECT_QUERIES": 3,
    "MODEL__DETR__DROPOUT": 0.3,
    "DATASETS__TEST": ("tiny_val",),
    "TEST__EVAL_PERIOD": 0,
    "SOLVER__BASE_LR": 1e-4,
    "SOLVER__MAX_ITER": 3,
    "SOLVER__STEPS": (),
}


def _train(data: Path, output: Path, *, period: int | None = None) -> Trainer:
    trainer = Trainer(config(data, output, **SMALL))
    if period is not None:
        trainer.register_hooks([RankHook.on_dataset(trainer.cfg, period=period)])
    trainer.resume_or_load(False)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_training_is_the_same_to_the_bit(tiny_data: Path, tmp_path: Path) -> None:
    off = _train(tiny_data, tmp_path / "off")
    on = _train(tiny_data, tmp_path / "on", period=1)
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(on.model.state_dict(), off.model.state_dict(), **exactly)

    lines = (tmp_path / "on" / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    final = [r for r in records if "rank/encoder/layer1/residual" in r][-1]
    assert final["iteration"] == 3
    names = {name.rpartition("/")[0] for name in final if name.startswith("rank/")}
    assert names == {
        *(f"rank/encoder/layer{i}" for i in range(2)),
        *(f"rank/decoder/layer{i}" for i in range(3)),
        *(f"rank/decoder, normalised/layer{i}" for i in (1, 2)),
    }
    hook = next(h for h in on._hooks if type(h).__name__ == "RankHook")
    assert len(hook.inputs) == 2  # type: ignore[attr-defined]
    values = [
        measure_rank(on.model, [x])["encoder"][1]["residual"][0]
        for x in hook.inputs  # type: ignore[attr-defined]
    ]
    assert final["rank/encoder/layer1/residual"] == pytest.approx(sum(values) / 2)
    assert not any("rank/" in line for line in (tmp_path / "off/metrics.json").open())


def test_iterations_that_are_measured(tiny_data: Path, tmp_path: Path) -> None:
    """Before steps 0 and 2, and after the last; the first value is that of the fresh model."""
    trainer = Trainer(config(tiny_data, tmp_path, **SMALL))
    hook = RankHook.on_dataset(trainer.cfg, period=2)
    trainer.register_hooks([hook])
    start = measure_rank(trainer.model, hook.inputs[:1])
    trainer.resume_or_load(False)
    trainer.train()
    history = trainer.storage.history("rank/encoder/layer1/cosine")
    assert [iteration for _, iteration in history.values()] == [0, 2, 3]
    assert start["encoder"][1]["cosine"][0] != history.latest()


def test_bad_settings_are_named(tiny_data: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(tiny_data, tmp_path))
    with pytest.raises(ValueError, match="period is 0"):
        RankHook.on_dataset(trainer.cfg, period=0)
    trainer.register_hooks([RankHook.on_dataset(trainer.cfg, period=2)])
    with pytest.raises(ValueError, match="RankHook cannot measure this model: TinyDetector"):
        trainer.train()
