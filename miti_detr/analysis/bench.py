"""Time and memory of inference and training, alone or side by side with another implementation.

Every side is measured in a process of its own, one for inference and one for training, which does
one step at a time when told to. With two sides the steps alternate, so that both see the same
machine, and the ratios are of neighbouring steps.
"""

import os
import statistics
import tempfile
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from .bench_child import Child, Clock, in_child, peak_device_memory, peak_memory
from .bench_sides import Side, build_side, set_dropout
from .bench_spec import BenchSpec, make_weights

FIRST_STEPS = 3  # training steps whose losses are compared
Result = dict[str, Any]


def bench_steps(spec: BenchSpec, tasks: tuple[str, ...], against: str | None = None) -> Result:
    """Measure steps of inference and training.

    Args:
        spec: what to measure.
        tasks: of ``inference`` and ``training``.
        against: another side to measure in turn with ours; see ``SIDES``.

    Returns:
        ``weights``, in words, and for each task: ``seconds`` (side to part to one value a step),
        ``memory`` (side to MiB), ``ratio`` (part to median, least and largest of the pairs) and
        ``agreement``.

    Raises:
        ValueError: if the other side cannot be the model of the config.
        ImportError: if it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = os.path.join(folder, "weights.pth")
        hf_folder = os.path.join(folder, "hf") if against == "hf" else ""
        said = in_child(spec.threads, make_weights, spec, weights, hf_folder)
        sides = ["ours"] + ([against] if against else [])
        places = (weights, hf_folder)
        return {"weights": said, **{t: _bench_task(spec, t, sides, places) for t in tasks}}


def _bench_task(spec: BenchSpec, task: str, names: list[str], places: tuple[str, str]) -> Result:
    prepare, first, step = (
        (_prepare_inference, _outputs, _infer)
        if task == "inference"
        else (_prepare_training, _first_losses, _train)
    )
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Child(spec.threads)) for name in names}
        start = {name: side.call(prepare, spec, name, *places) for name, side in sides.items()}
        firsts = {name: side.call(first) for name, side in sides.items()}
        for _ in range(spec.warmup):
            for side in sides.values():
                side.call(step)
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        for _ in range(spec.repeats):
            for name, side in sides.items():
                for part, value in side.call(step).items():
                    seconds[name].setdefault(part, []).append(value)
        memory = {name: side.call(_memory) for name, side in sides.items()}
    for name in names:
        memory[name]["start"] = start[name]
    result: Result = {"seconds": seconds, "memory": memory}
    if len(names) == 2:
        result["ratio"] = pair_ratios(*(seconds[name] for name in names))
        result["agreement"] = _AGREEMENT[task](*(firsts[name] for name in names))
    return result


def pair_ratios(
    ours: dict[str, list[float]], other: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """How many times as long the other takes, step by step.

    Args:
        ours: part to seconds of each step.
        other: the same, each step measured right after ours.

    Returns:
        Part to ``median``, ``min`` and ``max`` of the ratios of the pairs.
    """
    result = {}
    for part in ours:
        ratios = [b / a for a, b in zip(ours[part], other[part], strict=True)]
        result[part] = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        }
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


_AGREEMENT = {"inference": _compare_outputs, "training": _compare_losses}

# What follows runs in the child, and keeps its side here.
_side: Side


def _prepare_inference(spec: BenchSpec, name: str, weights: str, hf_folder: str) -> float:
    """Build a side; returns the most memory so far, in MiB."""
    global _side
    _side = build_side(spec, name, weights, hf_folder)
    _side.model.eval()
    return peak_memory()


def _prepare_training(spec: BenchSpec, name: str, weights: str, hf_folder: str) -> float:
    start = _prepare_inference(spec, name, weights, hf_folder)
    torch.manual_seed(spec.seed)
    _side.model.train()
    return start


def _outputs() -> tuple[np.ndarray, ...]:
    logits, boxes = (x.float().cpu().numpy() for x in _side.outputs())
    return logits, boxes


def _infer() -> dict[str, float]:
    clock = Clock(_side.device)
    _side.infer()
    clock.mark("inference")
    return clock.parts


def _first_losses() -> list[float]:
    """Losses of the first steps without dropout, whose draws differ between implementations."""
    set_dropout(_side.model, 0.0)
    losses = []
    for _ in range(FIRST_STEPS):
        total = _side.loss(Clock(_side.device))
        total.backward()
        _side.update()
        losses.append(total.item())
    set_dropout(_side.model, _side.cfg.MODEL.DETR.DROPOUT)
    return losses


def _train() -> dict[str, float]:
    clock = Clock(_side.device)
    total = _side.loss(clock)
    total.backward()
    clock.mark("backward")
    _side.update()
    clock.mark("optimizer")
    return {"step": sum(clock.parts.values()), **clock.parts}


def _memory() -> dict[str, float]:
    return {"peak": peak_memory(), "device_peak": peak_device_memory(_side.device)}
