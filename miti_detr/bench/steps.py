"""Time and memory of inference and of training steps of one model."""

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine import build_optimizer

from .evaluation import count_parameters
from .inputs import autocast, random_inputs, random_weights
from .meters import Clock, memory_marks, start_memory

WARMUP = 2  # steps that are not counted
Result = dict[str, Any]


class BenchModel(NamedTuple):
    """A model and random images, see :func:`build_bench_model`."""

    cfg: CfgNode
    model: nn.Module
    inputs: list[dict[str, Any]]


def build_bench_model(
    cfg: CfgNode,
    weights: str = "",
    *,
    batch: int = 2,
    size: tuple[int, int] = (512, 672),
    objects: int = 20,
) -> BenchModel:
    """Build the model of a config, and random images for it.

    Args:
        cfg: config of a detector.
        weights: checkpoint; "" for random weights.
        batch: number of images per step.
        size: height and width of the images in pixels.
        objects: number of objects per image, for training.

    Raises:
        ValueError: the config pre-trains on patches and is not a detector.
    """
    if cfg.INPUT.PATCHES.NUMBER > 0:
        raise ValueError(
            f"INPUT.PATCHES.NUMBER is {cfg.INPUT.PATCHES.NUMBER}. The benchmark measures detectors "
            "only; use the config of a detector"
        )
    inputs = random_inputs(cfg.MODEL.DETR.NUM_CLASSES, batch=batch, sizes=(size,), objects=objects)
    model = build_model(cfg)
    if weights:
        MitiDetrCheckpointer(model, cfg=cfg, for_training=False).load(weights)
    else:
        model.load_state_dict(random_weights(cfg, inputs))
    return BenchModel(cfg, model, inputs)


def bench_model(bench: BenchModel, *, precision: str = "float32", repeats: int = 7) -> Result:
    """Measure steps of inference and of training.

    Args:
        bench: model and images.
        precision: ``float32``, ``bfloat16`` or ``float16`` (autocast).
        repeats: number of measured steps.

    Returns:
        ``parameters`` and ``trainable`` (numbers), and for ``inference`` and ``training`` the
        ``seconds`` (name of the part to one value per step) and the ``memory`` (see
        :func:`~miti_detr.bench.meters.memory_marks`).
    """
    cfg, model, inputs = bench
    optimizer = build_optimizer(cfg, model)
    infer = functools.partial(_infer, model, inputs, precision)
    train = functools.partial(_train, model, inputs, precision, optimizer)
    return {
        **count_parameters(model),
        "inference": _measure(model.eval(), infer, repeats),
        "training": _measure(model.train(), train, repeats),
    }


def _infer(model: nn.Module, inputs: list[dict[str, Any]], precision: str, clock: Clock) -> None:
    with torch.no_grad(), autocast(clock.device, precision):
        model(inputs)
    clock.mark("inference")


def _train(
    model: nn.Module,
    inputs: list[dict[str, Any]],
    precision: str,
    optimizer: torch.optim.Optimizer,
    clock: Clock,
) -> None:
    with autocast(clock.device, precision):
        losses = model(inputs)
        total = torch.stack(list(losses.values())).sum()
    clock.mark("forward and losses")
    total.backward()
    clock.mark("backward")
    optimizer.step()
    optimizer.zero_grad()
    clock.mark("optimizer")


def _measure(model: nn.Module, step: Callable[[Clock], None], repeats: int) -> Result:
    device = next(model.parameters()).device
    start_memory()
    seconds: dict[str, list[float]] = {}
    for number in range(WARMUP + repeats):
        clock = Clock(device)
        step(clock)
        if number >= WARMUP:
            for part, value in clock.parts.items():
                seconds.setdefault(part, []).append(value)
    return {"seconds": seconds, "memory": memory_marks()}


def steps_table(result: Result, batch: int) -> str:
    """Format the result of :func:`bench_model`.

    Args:
        result: the result.
        batch: number of images per step.
    """
    rows = [
        *_task_rows("inference", result["inference"], batch),
        *_task_rows("training step", result["training"], batch),
    ]
    headers = ["", "ms (min..max)", "images/s", "peak MiB", "added MiB"]
    align = ("left", *("right",) * (len(headers) - 1))
    return (
        f"{result['parameters']:,} parameters, {result['trainable']:,} of them trainable\n"
        f"{tabulate(rows, headers, colalign=align, disable_numparse=True)}"
    )


def _task_rows(name: str, result: Result, batch: int) -> list[list[str]]:
    parts = result["seconds"]
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    memory = result["memory"]
    peak = memory["device_peak"] or memory["peak"]
    speed = f"{batch / statistics.median(totals):,.2f}"
    added = "" if memory["device_peak"] else f"{memory['added']:,.0f}"
    rows = [[name, milliseconds(totals), speed, f"{peak:,.0f}", added]]
    if len(parts) > 1:
        rows += [[f"- {part}", milliseconds(values), "", "", ""] for part, values in parts.items()]
    return rows


def milliseconds(seconds: Sequence[float]) -> str:
    """Format the median of some times in milliseconds, with the smallest and the largest."""
    middle, *ends = (1e3 * x for x in (statistics.median(seconds), min(seconds), max(seconds)))
    digits = 1 if middle < 100 else 0
    low, high = (f"{x:,.{digits}f}" for x in ends)
    return f"{middle:,.{digits}f} ({low}..{high})"
