"""SOLVER.ACCUMULATE 0: the micro-batch is found by trials, which leave no trace."""

import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from miti_detr.engine import Trainer
from miti_detr.engine import trainer as trainer_module
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.engine.step import micro_batch
from miti_detr.engine.step.micro_batch import MemoryProbe, WorstCase, largest_that_fits
from miti_detr.engine.step.train_step import TrainStep
from tests.engine.stub import config
from tests.helpers import tiny_config


@given(st.integers(1, 96), st.integers(0, 100))
def test_the_largest_divisor_that_fits(share: int, limit: int) -> None:
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    divisors = [d for d in range(1, share + 1) if share % d == 0]
    assert largest_that_fits(share, fits) == max((d for d in divisors if d <= limit), default=0)
    assert len(tried) == len(set(tried)) <= len(divisors).bit_length()


class Hungry(nn.Module):
    """Has memory for two images; keeps a weak reference to what it allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.allocated: weakref.ref[torch.Tensor] | None = None

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        x = torch.stack([item["image"].float().mean((1, 2)) for item in batch])
        output = self.layer(torch.cat([x, x + 1]))
        self.allocated = weakref.ref(output)
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError(f"{len(batch)} images")
        return {"loss": output.sum()}


def _step(model: nn.Module, cfg: Any) -> TrainStep:
    optimizer = torch.optim.AdamW(model.parameters())
    return TrainStep(model, [], optimizer, seed=1, guard=NonFiniteGuard(cfg), parts=0)


WORST = WorstCase((48, 64), (64, 64), objects=3, with_masks=False)


def test_out_of_memory_is_the_end_of_a_trial() -> None:
    model = Hungry()
    probe = MemoryProbe(_step(model, tiny_config()), WORST.batch)
    assert probe.fits(2)
    assert not probe.fits(4)
    assert model.allocated is not None
    assert model.allocated() is None
    assert largest_that_fits(12, probe.fits) == 2


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hungry()
    monkeypatch.setattr(model, "forward", lambda batch: batch.missing)
    with pytest.raises(AttributeError):
        MemoryProbe(_step(model, tiny_config()), WORST.batch).fits(1)


@pytest.mark.parametrize("masks", [False, True])
def test_a_trial_changes_nothing(masks: bool) -> None:
    """Weights, statistics, modes, gradients and random numbers of a model with batch norms."""
    fine = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"])
    switches = ("MODEL.MASK_ON", True, *fine) if masks else ()
    cfg = tiny_config("MODEL.RESNETS.NORM", "BN", "MODEL.DETR.DROPOUT", 0.3, *switches)
    model = build_model(cfg)
    step = _step(model, cfg)
    model.transformer.eval()
    modes = [module.training for module in model.modules()]
    kept = next(model.parameters())
    kept.grad = gradient = torch.ones_like(kept)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    worst = WorstCase((48, 64), (64, 64), objects=3, with_masks=masks)
    assert MemoryProbe(step, worst.batch, reserved=100).fits(2)
    torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert kept.grad is gradient
    assert torch.equal(gradient, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)


def test_a_trial_is_a_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All trained weights get gradients, on top of those of the parts before."""
    model = Hungry()
    frozen, weight = model.layer[0].bias, model.layer[0].weight
    frozen.requires_grad_(False)
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    probe = MemoryProbe(_step(model, tiny_config()), WORST.batch)
    zeros = []
    make = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x: zeros.append(x) or make(x))
    assert probe.fits(1)
    assert len(seen) == 1
    assert any(x is weight for x in zeros)
    assert not any(x is frozen for x in zeros)


def _records(*sizes: tuple[int, int], objects: int = 1) -> list[dict[str, Any]]:
    annotations = [{"iscrowd": 0}] * objects + [{"iscrowd": 1}]
    records = [{"height": h, "width": w, "annotations": []} for h, w in sizes]
    return [*records[:-1], {**records[-1], "annotations": annotations}]


@pytest.mark.parametrize(
    ("overrides", "sizes", "single", "padded"),
    [
        # Shorter side 100, longer at most 150; a group of wide images and one of the others
        ((), [(200, 200), (200, 260), (260, 200)], (130, 100), (130, 100)),
        ((), [(50, 50), (400, 480), (200, 280)], (100, 140), (100, 140)),
        ((), [(200, 800), (200, 220), (200, 200)], (100, 110), (100, 150)),
        (
            ("DATALOADER.ASPECT_RATIO_GROUPING", False),
            [(200, 260), (260, 200)],
            (100, 130),
            (130, 130),
        ),
        (("INPUT.CROP.ENABLED", True), [(200, 200)], (100, 150), (150, 150)),
        ((), [(200, 200), (0, 0)], (100, 150), (150, 150)),
    ],
)
def test_the_largest_images(
    overrides: tuple[Any, ...],
    sizes: list[tuple[int, int]],
    single: tuple[int, int],
    padded: tuple[int, int],
) -> None:
    resize = ("INPUT.MIN_SIZE_TRAIN", (80, 100), "INPUT.MAX_SIZE_TRAIN", 150)
    cfg = tiny_config("INPUT.CROP.ENABLED", False, *resize, *overrides)
    worst = WorstCase.from_records(cfg, _records(*sizes))
    assert worst.single in (single, single[::-1])
    assert worst.padded in (padded, padded[::-1])
    assert [x["image"].shape for x in worst.batch(1)] == [(3, *worst.single)]
    first, _, last = worst.batch(3)
    assert first["image"].shape == (3, *worst.padded)
    assert last["image"].shape[1] < worst.padded[0]


@pytest.mark.parametrize(("objects", "expected"), [(4, 4), (50, 7)])
def test_the_fullest_image(objects: int, expected: int) -> None:
    """Without crowds, and not more than the 7 queries."""
    worst = WorstCase.from_records(tiny_config(), _records((64, 64), (64, 80), objects=objects))
    assert worst.objects == expected
    assert all(len(x["instances"]) == expected for x in worst.batch(2))


def _choose(
    data: Path, output: Path, monkeypatch: pytest.MonkeyPatch, limit: int, others: list[bool]
) -> int:
    """The choice for 8 images on each of two GPUs of 80 GiB, of which this one fits ``limit``.

    ``others``: what the other one answers, trial by trial.
    """

    class Probe:
        def __init__(self, step: Any, make_batch: Any, reserved: int) -> None:
            # A tenth, two states of AdamW of 100 weights, two batches of 8 images of 28 x 37
            assert reserved == 8 * 2**30 + 2 * 4 * 100 + 2 * 8 * 3 * 28 * 37
            self.peaks: dict[int, int] = {}

        def fits(self, size: int) -> bool:
            self.peaks[size] = (8 + 3 * size) * 2**30
            return size <= limit

    answers = iter(others)
    gpu = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(micro_batch, "MemoryProbe", Probe)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    cfg = config(data, output, SOLVER__IMS_PER_BATCH=16, SOLVER__ACCUMULATE=0)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda found: [found, next(answers)])
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(100))])
    step: Any = SimpleNamespace(device=torch.device("cuda"), optimizer=optimizer)
    return micro_batch.choose_parts(cfg, step)


def test_processes_agree_on_the_smallest(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """This GPU fits 4 images, the other one 2."""
    assert _choose(tiny_data, tmp_path, monkeypatch, 4, [False, True]) == 4
    text = "micro-batch 2, accumulated 4 times; peak 6.0 of 80.0 GiB (images up to 28 x 37, 1 obj"
    assert text in log.text


def test_an_image_that_does_not_fit(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"ACCUMULATE is 0, but the step of one image .* 80.0 GiB .* INPUT.MAX_SIZE_TRAIN"
    with pytest.raises(ValueError, match=message):
        _choose(tiny_data, tmp_path, monkeypatch, 8, [False, False, False])


def test_on_a_cpu_the_batch_is_one_part(
    tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(config(tiny_data, tmp_path, SOLVER__ACCUMULATE=0, SOLVER__MAX_ITER=1))
    trainer.train()
    assert trainer.cfg.SOLVER.ACCUMULATE == 1
    assert log.text.count("memory is probed on GPUs only; the batch is one part") == 1


def test_a_resumed_run_takes_the_recorded_value(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It equals, to the last bit, a run with that number that was never stopped."""
    changes: dict[str, Any] = {"MODEL__DETR__DROPOUT": 0.3, "SOLVER__STEPS": ()}
    whole = Trainer(config(tiny_data, tmp_path / "whole", **changes, SOLVER__ACCUMULATE=2))
    whole.train()

    found = iter([2])  # a second search would find nothing
    monkeypatch.setattr(trainer_module, "choose_parts", lambda cfg, step: next(found))
    for end in (3, 6):
        changes |= {"SOLVER__ACCUMULATE": 0, "SOLVER__MAX_ITER": end}
        trainer = Trainer(config(tiny_data, tmp_path / "parts", **changes))
        trainer.resume_or_load(resume=True)
        trainer.train()
        recorded = (tmp_path / "parts" / "config.yaml").read_text()
        assert re.search(r"^  ACCUMULATE: 2$", recorded, re.MULTILINE)
    weights = trainer.model.state_dict()
    torch.testing.assert_close(weights, whole.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "key", ["MODEL__CUDA_GRAPHS", "MODEL__BACKBONE__CACHE_FEATURES", "INPUT__PATCHES__NUMBER"]
)
def test_what_cannot_be_probed_is_named(tiny_data: Path, tmp_path: Path, key: str) -> None:
    value = True if key == "MODEL__CUDA_GRAPHS" else 3
    message = f"SOLVER.ACCUMULATE is 0 and {key.replace('__', '.')} is {value}"
    with pytest.raises(ValueError, match=message):
        config(tiny_data, tmp_path, SOLVER__ACCUMULATE=0, **{key: value})
