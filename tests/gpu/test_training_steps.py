"""Training steps on a GPU: late records, prefetched batches, averaged weights."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from miti_detr.engine import NonFiniteError, Trainer, build_optimizer
from miti_detr.engine.hooks import read_records
from miti_detr.engine.hooks.nonfinite import NonFiniteGuard
from miti_detr.engine.solver import WeightAverage
from miti_detr.engine.step.micro_batch import MemoryProbe, WorstCase, largest_that_fits
from miti_detr.engine.step.prefetch import Prefetcher
from miti_detr.engine.step.train_step import TrainStep
from tests.engine.stub import config, write_data
from tests.fill import filled
from tests.helpers import tiny_config, training_input

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BATCH = [training_input((96, 128), [[4, 5, 30, 40]], [1], seed) for seed in range(4)]


def _step(folder: Path, *overrides: Any, **arguments: Any) -> TrainStep:
    keys = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DETR.DROPOUT", 0.0, "MODEL.DEVICE", "cuda")
    cfg = tiny_config(*keys, "OUTPUT_DIR", str(folder), *overrides)
    model = build_model(cfg)
    model.load_state_dict(filled(model.state_dict()))
    optimizer, guard = build_optimizer(cfg, model), NonFiniteGuard(cfg)
    return TrainStep(model, [BATCH] * 9, optimizer, seed=1, guard=guard, **arguments)


def _run(step: TrainStep, steps: int) -> list[float]:
    with EventStorage() as storage:
        for step.iter in range(steps):
            storage.iter = step.iter
            step.run_step()
        step.write_record()
        return [value for value, _ in storage.history("total_loss").values()]


@pytest.mark.parametrize("optimizer", ["ADAMW", "SGD"])
@pytest.mark.parametrize("parts", [1, 2])
def test_late_steps_equal_those_at_once(optimizer: str, parts: int, tmp_path: Path) -> None:
    """Losses of four steps to 1e-4."""
    steps = [
        _step(tmp_path, "SOLVER.OPTIMIZER", optimizer, parts=number, late=late)
        for number, late in ((parts, None), (1, False))
    ]
    assert [step.late for step in steps] == [True, False]
    found, expected = (_run(step, 4) for step in steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_precisions(dtype: torch.dtype | None, tmp_path: Path) -> None:
    step = _step(tmp_path, amp_dtype=dtype)
    assert step.late == (dtype != torch.float16)
    assert all(map(math.isfinite, _run(step, 4)))


def test_weights_stay_until_the_host_knows(tmp_path: Path) -> None:
    step = _step(tmp_path)
    _run(step, 2)
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    step.model.input_proj.register_forward_hook(lambda _m, _i, out: out * math.nan)
    with pytest.raises(NonFiniteError, match="the loss is not finite at iteration 0"):
        _run(step, 2)
    torch.testing.assert_close(dict(step.model.state_dict()), before, rtol=0, atol=0)
    assert list(tmp_path.glob("nonfinite_iter0_rank0.pth"))


def test_waits_of_a_whole_step(tmp_path: Path) -> None:
    """One for the costs of the matching. The copy of what is logged has come by then."""
    step = _step(tmp_path)
    average = WeightAverage(step.model, decay=0.9)
    with EventStorage():
        for step.iter in range(3):
            step.run_step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step.run_step()
                average.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(places) <= 1, "\n".join(places)


def test_prefetched_batches_are_on_the_device() -> None:
    pinned = [[{**x, "image": x["image"].pin_memory()} for x in BATCH] for _ in range(3)]
    batches = Prefetcher(pinned, torch.device("cuda", torch.cuda.current_device()))
    for _ in pinned:
        batches.fetch()
        for found, expected in zip(next(batches), BATCH, strict=True):
            assert found["image"].is_cuda
            assert found["instances"].gt_boxes.device.type == "cpu"
            torch.testing.assert_close(found["image"].cpu(), expected["image"], rtol=0, atol=0)


def test_a_micro_batch_that_fits(tmp_path: Path) -> None:
    """With memory for more than one image and less than two; all of it is released."""
    step = _step(tmp_path)
    probe = MemoryProbe(step, WorstCase((800, 800), (800, 800), 5, with_masks=False).batch)
    assert probe.fits(1)
    before = torch.cuda.memory_allocated(step.device)
    assert probe.fits(2)
    assert probe.peaks[1] < probe.peaks[2]
    total = torch.cuda.get_device_properties(step.device).total_memory
    between = (probe.peaks[1] + probe.peaks[2]) / 2
    torch.cuda.set_per_process_memory_fraction(between / total, step.device)
    try:
        assert largest_that_fits(4, probe.fits) == 1
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, step.device)
    assert torch.cuda.memory_allocated(step.device) == before


def test_a_run_resumes(tmp_path: Path) -> None:
    """With workers, parts, an average and evaluations: losses to 1e-4 of an uninterrupted run."""
    write_data(tmp_path / "data")
    changes: dict[str, Any] = {"MODEL__DEVICE": "cuda", "DATALOADER__NUM_WORKERS": 2}
    changes |= {"SOLVER__MAX_ITER": 30, "SOLVER__STEPS": (), "SOLVER__CHECKPOINT_PERIOD": 10}
    changes |= {"SOLVER__ACCUMULATE": 2, "SOLVER__EMA__ENABLED": True, "TEST__EVAL_PERIOD": 10}
    changes |= {"DATASETS__TEST": ("tiny_val",)}
    for name in ("whole", "resumed"):
        Trainer(config(tmp_path / "data", tmp_path / name, **changes)).train()
    (tmp_path / "resumed" / "last_checkpoint").write_text("model_0000009.pth")
    trainer = Trainer(config(tmp_path / "data", tmp_path / "resumed", **changes))
    trainer.resume_or_load()
    trainer.train()
    assert trainer.start_iter == 10
    whole, resumed = (
        {r["iteration"]: r for r in read_records(str(tmp_path / name / "metrics.json"))}
        for name in ("whole", "resumed")
    )
    assert whole.keys() == resumed.keys()
    for iteration, record in whole.items():
        for key in ("total_loss", "loss_ce", "grad_norm"):
            if key in record:
                assert resumed[iteration][key] == pytest.approx(record[key], rel=1e-4)
