"""Time and memory of inference and training, alone or side by side with another implementation.

Every side is measured in a process of its own, one for inference and one for training, which does
one step at a time when told to. With two sides the steps alternate, so that both see the same
machine, and the ratios are of neighbouring steps.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .bench_child import Clock, alternate, pair_ratios, start_memory
from .bench_sides import Side, build_side, set_dropout
from .bench_spec import BenchSpec, Weights

FIRST_STEPS = 3  # training steps whose losses are compared
Result = dict[str, Any]


def bench_steps(spec: BenchSpec, task: str, weights: Weights, against: str | None = None) -> Result:
    """Measure steps of inference or training.

    Args:
        spec: what to measure.
        task: ``inference`` or ``training``.
        weights: of all sides.
        against: another side to measure in turn with ours; see ``SIDES``.

    Returns:
        ``seconds`` (side to part to one value a step), ``memory`` (side to MiB); with another side
        ``ratio`` (part to median, least and largest of the pairs) and ``agreement``.

    Raises:
        ValueError: if the other side cannot be the model of the config.
        ImportError: if it is not installed.
    """
    sides = ["ours"] + ([against] if against else [])
    prepare, step, compare = _TASKS[task]
    measured = alternate(
        sides,
        prepare,
        step,
        (spec, weights),
        threads=spec.threads,
        warmup=spec.warmup,
        repeats=spec.repeats,
    )
    result: Result = {"seconds": measured.seconds, "memory": measured.memory}
    if len(sides) == 2:
        result["ratio"] = pair_ratios(*(measured.seconds[side] for side in sides))
    if against not in (None, "detr"):  # which computes something else
        result["agreement"] = compare(*(measured.prepared[side] for side in sides))
    return result


def _compare_outputs(ours: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> Result:
    differences = [float(np.abs(a - b).max()) for a, b in zip(ours, other, strict=True)]
    return {"logits_max_difference": differences[0], "boxes_max_difference": differences[1]}


def _compare_losses(ours: list[float], other: list[float]) -> Result:
    difference = max(abs(a - b) for a, b in zip(ours, other, strict=True))
    relative = max(abs(a - b) / abs(a) for a, b in zip(ours, other, strict=True))
    return {
        "losses": [ours, other],
        "losses_max_difference": difference,
        "losses_max_relative_difference": relative,
    }


# What follows runs in the child, and keeps its side here.
_side: Side


def _prepare_inference(name: str, spec: BenchSpec, weights: Weights) -> tuple[np.ndarray, ...]:
    """Build a side; returns logits and boxes."""
    global _side
    _side = build_side(spec, name, weights)
    _side.model.eval()
    start_memory()
    logits, boxes = (x.float().cpu().numpy() for x in _side.outputs())
    return logits, boxes


def _prepare_training(name: str, spec: BenchSpec, weights: Weights) -> list[float]:
    """Build a side; returns the losses of the first steps.

    They are without dropout, whose draws differ between implementations.
    """
    global _side
    _side = build_side(spec, name, weights)
    torch.manual_seed(spec.seed)
    _side.model.train()
    start_memory()
    set_dropout(_side.model, 0.0)
    losses = [_side.train_step(Clock(_side.device)) for _ in range(FIRST_STEPS)]
    set_dropout(_side.model, _side.cfg.MODEL.DETR.DROPOUT)
    return losses


def _infer() -> dict[str, float]:
    clock = Clock(_side.device)
    _side.infer()
    clock.mark("inference")
    return clock.parts


def _train() -> dict[str, float]:
    clock = Clock(_side.device)
    _side.train_step(clock)
    return {"step": sum(clock.parts.values()), **clock.parts}


_TASKS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, float]], Callable[..., Result]]]
_TASKS = {
    "inference": (_prepare_inference, _infer, _compare_outputs),
    "training": (_prepare_training, _train, _compare_losses),
}
