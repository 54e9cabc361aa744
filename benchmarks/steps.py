"""Time and memory of inference and training, for this package or in turn with another peer.

Each peer is measured in its own process. With two peers the steps alternate, so that both see the
same state of the machine, and the ratios of times are those of neighbouring steps.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from miti_detr.bench.meters import Clock, start_memory

from .peers import build_peer, set_dropout
from .spec import BenchSpec, Weights
from .worker import Step, alternate, times_as_fast

FIRST_STEPS = 3  # number of training steps whose losses are compared
Result = dict[str, Any]


def bench_steps(spec: BenchSpec, task: str, weights: Weights, against: str | None = None) -> Result:
    """Measure steps of inference or training.

    Args:
        spec: what to measure.
        task: ``inference`` or ``training``.
        weights: weights of all peers.
        against: another peer, one of ``PEERS``, to measure in turn with ours.

    Returns:
        ``seconds`` (peer to part to one value per step) and ``memory`` (peer to
        :func:`~miti_detr.bench.meters.memory_marks`). With another peer also ``times_as_fast``
        (part to median, minimum and maximum of the other's time divided by ours),
        ``times_the_memory`` (our memory divided by the other's, by mark) and ``agreement``, which
        is omitted for a peer that computes another function.

    Raises:
        ValueError: the other peer cannot compute what the config says.
        ImportError: the other peer is not installed.
    """
    peers = ["ours"] + ([against] if against else [])
    prepare, compare = _TASKS[task]
    measured = alternate(
        peers,
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


# The functions below run in the worker.
def _prepare_inference(
    name: str, spec: BenchSpec, weights: Weights
) -> tuple[tuple[np.ndarray, ...], Step]:
    """Build a peer. Returns its logits and boxes, and the step."""
    peer = build_peer(spec, name, weights)
    peer.model.eval()
    start_memory()
    logits, boxes = (x.float().cpu().numpy() for x in peer.outputs())

    def infer() -> dict[str, float]:
        clock = Clock(peer.device)
        peer.infer()
        clock.mark("inference")
        return clock.parts

    return (logits, boxes), infer


def _prepare_training(name: str, spec: BenchSpec, weights: Weights) -> tuple[list[float], Step]:
    """Build a peer. Returns the losses of the first steps, and the step.

    The first steps have no dropout, because implementations draw different random numbers.
    """
    peer = build_peer(spec, name, weights)
    torch.manual_seed(spec.seed)
    peer.model.train()
    start_memory()
    set_dropout(peer.model, 0.0)
    losses = [peer.train_step(Clock(peer.device)) for _ in range(FIRST_STEPS)]
    set_dropout(peer.model, peer.cfg.MODEL.DETR.DROPOUT)

    def train() -> dict[str, float]:
        clock = Clock(peer.device)
        peer.train_step(clock)
        return {"step": sum(clock.parts.values()), **clock.parts}

    return losses, train


_TASKS: dict[str, tuple[Callable[..., tuple[Any, Step]], Callable[..., Result]]] = {
    "inference": (_prepare_inference, _compare_outputs),
    "training": (_prepare_training, _compare_losses),
}
