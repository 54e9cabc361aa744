"""Time and memory of inference and training, alone or side by side with another implementation.

Every side is measured in a process of its own, one for inference and one for training, which does
one step at a time when told to. With two sides the steps alternate, so that both see the same
machine, and the ratios of times are of neighbouring steps.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .meters import Clock, start_memory
from .sides import build_side, set_dropout
from .spec import BenchSpec, Weights
from .worker import Step, alternate, times_as_fast

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
        ``seconds`` (side to part to one value a step) and ``memory`` (side to
        :func:`memory_marks`). With another side also ``times_as_fast`` (part to median, least and
        largest of the other's time over ours, pair by pair), ``times_the_memory`` (our memory over
        the other's, by mark) and ``agreement``, which is left out against a model that computes
        something else.

    Raises:
        ValueError: if the other side cannot be the model of the config.
        ImportError: if it is not installed.
    """
    sides = ["ours"] + ([against] if against else [])
    prepare, compare = _TASKS[task]
    measured = alternate(
        sides,
        prepare,
        (spec, weights),
        threads=spec.threads,
        warmup=spec.warmup,
        repeats=spec.repeats,
    )
    result: Result = {"seconds": measured.seconds, "memory": measured.memory}
    if against:
        ours, other = measured.memory.values()
        result["times_as_fast"] = times_as_fast(*measured.seconds.values())
        result["times_the_memory"] = {k: v / other[k] for k, v in ours.items() if other[k]}
        if against != "detr":
            result["agreement"] = compare(*measured.prepared.values())
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


# What follows runs in the child.
def _prepare_inference(
    name: str, spec: BenchSpec, weights: Weights
) -> tuple[tuple[np.ndarray, ...], Step]:
    """Build a side; returns logits and boxes, and the step."""
    side = build_side(spec, name, weights)
    side.model.eval()
    start_memory()
    logits, boxes = (x.float().cpu().numpy() for x in side.outputs())

    def infer() -> dict[str, float]:
        clock = Clock(side.device)
        side.infer()
        clock.mark("inference")
        return clock.parts

    return (logits, boxes), infer


def _prepare_training(name: str, spec: BenchSpec, weights: Weights) -> tuple[list[float], Step]:
    """Build a side; returns the losses of the first steps, and the step.

    The first steps are without dropout, whose draws differ between implementations.
    """
    side = build_side(spec, name, weights)
    torch.manual_seed(spec.seed)
    side.model.train()
    start_memory()
    set_dropout(side.model, 0.0)
    losses = [side.train_step(Clock(side.device)) for _ in range(FIRST_STEPS)]
    set_dropout(side.model, side.cfg.MODEL.DETR.DROPOUT)

    def train() -> dict[str, float]:
        clock = Clock(side.device)
        side.train_step(clock)
        return {"step": sum(clock.parts.values()), **clock.parts}

    return losses, train


_TASKS: dict[str, tuple[Callable[..., tuple[Any, Step]], Callable[..., Result]]] = {
    "inference": (_prepare_inference, _compare_outputs),
    "training": (_prepare_training, _compare_losses),
}
