"""Length and learning rate of a run, the plan, and the doubts about it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode

from miti_detr.engine import Trainer, setup_config
from miti_detr.engine.solver import build_scheduler, resolve_schedule, scale_to_batch
from miti_detr.engine.solver.plan import describe_plan, describe_speed, doubts
from tests.engine.stub import config as stub_config
from tests.helpers import ROOT

CPU = ("MODEL.DEVICE", "cpu")
COCO_IMAGES = 118_287


def _config(*options: Any, file: str = "") -> CfgNode:
    return setup_config(file, [str(x) for x in (*CPU, *options)])


def _rates(cfg: CfgNode) -> list[float]:
    """Learning rates of all iterations."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=cfg.SOLVER.BASE_LR)
    scheduler, rates = build_scheduler(cfg, optimizer), []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_flat_then_cosine_after_a_warm_up() -> None:
    """Linear from .1 r to r in 4 iterations, r up to 20, then e + (r - e) (1 + cos(pi x)) / 2."""
    solver = ("MAX_ITER", 60, "STEPS", (20,), "BASE_LR", 0.5, "BASE_LR_END", 0.1)
    solver += ("WARMUP_ITERS", 4, "WARMUP_FACTOR", 0.1, "LR_SCHEDULER_NAME", "WarmupFlatCosineLR")
    options = [x if i % 2 else f"SOLVER.{x}" for i, x in enumerate(solver)]
    cfg = _config(*options)
    resolve_schedule(cfg, None)
    expected = [0.5 * (0.1 + 0.9 * t / 4) for t in range(4)] + [0.5] * 16
    cosine = [(1 + math.cos(math.pi * (t - 20) / 40)) / 2 for t in range(20, 60)]
    expected += [0.1 + 0.4 * c for c in cosine]
    assert _rates(cfg) == pytest.approx(expected, rel=1e-6)


def test_cosine_of_detectron2() -> None:
    cosine = ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", 0)
    cfg = _config(*cosine, "SOLVER.MAX_ITER", 10, "SOLVER.BASE_LR", 1.0)
    resolve_schedule(cfg, None)
    expected = [(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]
    assert _rates(cfg) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("LR_SCHEDULER_NAME", "WarmupFlatCosineLR"), r"but there are 0 before MAX_ITER"),
        (("STEPS", (5, 9), "LR_SCHEDULER_NAME", "WarmupFlatCosineLR"), r"there are 2 .* Give one"),
        (("BASE_LR", 0.1, "BASE_LR_END", 0.2, "LR_SCHEDULER_NAME", "WarmupCosineLR"), r"at most"),
        (("REFERENCE_BATCH", 8, "REFERENCE_WORLD_SIZE", 2), r"both would scale .* Set one to 0"),
    ],
)
def test_schedules_that_cannot_be(options: tuple[Any, ...], message: str) -> None:
    base = ("SOLVER.MAX_ITER", 60, "SOLVER.STEPS", ())
    with pytest.raises(ValueError, match=message):
        resolve_schedule(
            _config(*base, *(x if i % 2 else f"SOLVER.{x}" for i, x in enumerate(options))), 100
        )


def test_warm_up_in_epochs(log: pytest.LogCaptureFixture) -> None:
    """Half an epoch of 100 images in batches of 8: 6 of 12 iterations; late steps are named."""
    cfg = _config("SOLVER.WARMUP_EPOCHS", 0.5, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 99)
    cfg.SOLVER.STEPS = (40, 99, 120)
    resolve_schedule(cfg, 100)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS) == (6, (40,))
    assert "SOLVER.STEPS [99, 120] are not before the end of the run, MAX_ITER 99" in log.text
    with pytest.raises(ValueError, match=r"SOLVER.WARMUP_EPOCHS is 0.5, but the data loader"):
        resolve_schedule(cfg, None)


@pytest.mark.parametrize(("optimizer", "factor"), [("ADAMW", 0.5), ("SGD", 0.25)])
def test_another_batch_scales_rate_and_schedule(
    optimizer: str, factor: float, log: pytest.LogCaptureFixture
) -> None:
    """A quarter of the batch: four times the iterations; the rate by the root, or linearly."""
    cfg = _config(
        *("SOLVER.REFERENCE_BATCH", 64, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.OPTIMIZER", optimizer),
        *("SOLVER.BASE_LR", 1e-4, "SOLVER.MAX_ITER", 1000, "SOLVER.STEPS", (600, 800)),
        *("SOLVER.WARMUP_ITERS", 10, "TEST.EVAL_PERIOD", 100, "SOLVER.CHECKPOINT_PERIOD", 50),
    )
    for _ in range(2):  # the second call has nothing to do
        scale_to_batch(cfg)
        solver = cfg.SOLVER
        assert pytest.approx(1e-4 * factor) == solver.BASE_LR
        assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (4000, (2400, 3200), 40)
        assert (cfg.TEST.EVAL_PERIOD, solver.CHECKPOINT_PERIOD) == (400, 200)
        assert (solver.REFERENCE_BATCH, cfg.MODEL.DETR.RESIDUAL_RAMP_ITERS) == (16, 0)
    assert f"is scaled by {factor:g}" in log.text
    assert "SOLVER.MAX_ITER 1000 -> 4000" in log.text
    assert "SOLVER.STEPS (600, 800) -> (2400, 3200)" in log.text


def test_epochs_are_not_scaled(log: pytest.LogCaptureFixture) -> None:
    cfg = _config("SOLVER.REFERENCE_BATCH", 8, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.EPOCHS", 3)
    scale_to_batch(cfg)
    resolve_schedule(cfg, 160)
    assert cfg.SOLVER.MAX_ITER == 30
    assert "MAX_ITER" not in log.text


def test_the_plan_of_a_run() -> None:
    cfg = _config(
        *("SOLVER.IMS_PER_BATCH", 16, "SOLVER.ACCUMULATE", 4, "SOLVER.MAX_ITER", 1000),
        *("SOLVER.STEPS", (800,), "TEST.EVAL_PERIOD", 250, "SOLVER.CHECKPOINT_PERIOD", 400),
        *("DATASETS.TEST", ("shapes_val",), "SOLVER.BASE_LR", 2e-4, "SOLVER.WARMUP_ITERS", 20),
    )
    text = describe_plan(cfg, num_images=1600, start=0)
    assert text == (
        "1,000 iterations of 16 images in 4 parts, 16,000 images in all: 10 epochs of 1,600 images "
        "(100 iterations); 4 evaluations, 3 checkpoints; learning rate 0.0002, times 0.1 at 800 "
        "after a warm-up of 20 iterations"
    )
    assert describe_plan(cfg, num_images=None, start=600).startswith(
        "400 iterations of 16 images in 4 parts, 6,400 images in all; 2 evaluations, 2 checkpoints;"
    )
    assert "1.5 hours for the other 2,700," in describe_speed(2.0, 2700)
    assert "2.0 minutes for the other 60," in describe_speed(2.0, 60)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("SOLVER.MAX_ITER", 6000), ["6,000 steps are few"]),
        (("SOLVER.MAX_ITER", 6000, "MODEL.DETR.HIDDEN_DIM", 64), []),
        (("SOLVER.BASE_LR", 1e-3), ["BASE_LR 0.001 is 10 times that of DETR"]),
        (("SOLVER.BASE_LR", 1e-4, "SOLVER.IMS_PER_BATCH", 1), []),
        (("SOLVER.BASE_LR", 2e-4, "SOLVER.IMS_PER_BATCH", 1), ["Set 1.3e-05, or 0.0001 with"]),
        (("SOLVER.WARMUP_ITERS", 10**6, "SOLVER.WARMUP_FACTOR", 0.1), ["not before the end"]),
        (("SOLVER.IMS_PER_BATCH", 2 * COCO_IMAGES), ["more than the 118287 images"]),
        (("SOLVER.EARLY_STOP.PATIENCE", 100, "TEST.EVAL_PERIOD", 18480), ["it cannot stop"]),
        (("SOLVER.EMA.ENABLED", True), []),
        (("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.999999), ["has the first weights"]),
    ],
)
def test_doubts(options: tuple[Any, ...], found: list[str]) -> None:
    cfg = _config(*options, file=str(ROOT / "configs/coco/miti_detr_R50_300ep.yaml"))
    resolve_schedule(cfg, COCO_IMAGES)
    lines = list(doubts(cfg, num_images=COCO_IMAGES, from_scratch=True))
    assert len(lines) == len(found)
    assert all(words in line for words, line in zip(found, lines, strict=True)), lines
    if "few" in "".join(found):
        assert not list(doubts(cfg, num_images=COCO_IMAGES, from_scratch=False))


def test_no_doubt_about_the_configs_of_the_project() -> None:
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        if "studies" not in path.parts and "Base" not in path.name:
            cfg = _config(file=str(path))
            if cfg.SOLVER.MAX_ITER == 40_000:  # Detectron2's default: a model without a schedule
                continue
            lines = list(doubts(cfg, num_images=COCO_IMAGES, from_scratch=True))
            assert not lines, (path, lines)


def test_plan_and_speed_are_in_the_log(
    tiny_data: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Also after a resume, without the doubts."""
    changes = {"SOLVER__MAX_ITER": 14, "SOLVER__STEPS": (), "SOLVER__BASE_LR": 0.9}
    Trainer(stub_config(tiny_data, tmp_path, **changes)).train()
    assert "plan: 14 iterations of 4 images, 56 images in all: 7 epochs of 10 images" in log.text
    assert "SOLVER.BASE_LR 0.9 is too much" in log.text
    assert "for the other 2, without evaluations" in log.text
    log.clear()
    trainer = Trainer(stub_config(tiny_data, tmp_path, **changes, SOLVER__CHECKPOINT_PERIOD=99))
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    trainer.resume_or_load()
    trainer.train()
    assert "plan: 11 iterations of 4 images" in log.text
    assert "is too much" not in log.text


def test_loaded_weights_are_no_start_from_scratch(tiny_data: Path, tmp_path: Path) -> None:
    cfg = stub_config(tiny_data, tmp_path)
    first = Trainer(cfg)
    first.resume_or_load(resume=False)
    assert first._plan.from_scratch
    torch.save({"model": first.model.state_dict()}, tmp_path / "w.pth")
    weights = str(tmp_path / "w.pth")
    other = Trainer(stub_config(tiny_data, tmp_path / "b", SEED=8, MODEL__WEIGHTS=weights))
    other.resume_or_load(resume=False)
    assert not other._plan.from_scratch
