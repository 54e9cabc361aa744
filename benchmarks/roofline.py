"""Where the time of a training step goes, against what this machine can do at best."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from miti_detr.modeling import Feature

from .meters import Clock
from .sides import Side
from .spec import BenchSpec

MATRIX = 3072  # side of the matrices whose product gives the rate
COPY_MIB = 256
PARTS = ("backbone", "transformer", "heads and losses", "optimizer")


def bench_limit(spec: BenchSpec, weights: str) -> dict[str, Any]:
    """Time the parts of training steps, and the machine's own rates before and after.

    Backbone, transformer, and heads with the losses are run forward and backward one by one, with
    the graph cut between them.

    Args:
        spec: what to measure.
        weights: checkpoint to begin with.

    Returns:
        ``rates``: floating point operations per second (a multiply-add counts two) of a square
        matrix product as a ``product`` and as a 1x1 ``convolution``, which use different libraries
        on a CPU, and bytes per second of a ``copy``. ``parts``: of each part the median
        ``forward`` and ``backward`` in seconds, its ``flops``, and the ``share`` of the better
        matrix rate that it reaches (optimizer: of the copy rate). ``step``: seconds in all.
    """
    side = Side(spec, "ours", weights)
    side.model.train()
    flops = _count_flops(side)
    rates = [_rates(side)]
    clocks = []
    for number in range(spec.warmup + spec.repeats):
        clock = Clock(side.device)
        _step(side, clock)
        if number >= spec.warmup:
            clocks.append(clock.parts)
    rates.append(_rates(side))
    rate = {name: max(r[name] for r in rates) for name in rates[0]}
    return {
        "rates": rate,
        "parts": {name: _part(name, clocks, flops, rate, side) for name in PARTS},
        "step": statistics.median(sum(parts.values()) for parts in clocks),
    }


def _part(
    name: str,
    clocks: list[dict[str, float]],
    flops: dict[str, int],
    rate: dict[str, float],
    side: Side,
) -> dict[str, float]:
    forward, backward = (
        statistics.median(parts.get(f"{name} {way}", 0.0) for parts in clocks)
        for way in ("forward", "backward")
    )
    seconds = forward + backward
    if name == "optimizer":
        share = _optimizer_bytes(side) / seconds / rate["copy"]
    else:
        best = max(rate["product"], rate["convolution"])
        share = flops[name] / seconds / best
    return {"forward": forward, "backward": backward, "flops": flops.get(name, 0), "share": share}


def _step(side: Side, clock: Clock) -> None:
    """A training step in parts; what is before the backbone counts to it."""
    model: Any = side.model
    with side.autocast():
        images = model.preprocess_image(side.inputs)
        ((name, (feature, mask)),) = model.backbone(images).items()
        clock.mark("backbone forward")
        cut = feature.detach().requires_grad_()
        encoded = model.encode_features({name: Feature(cut, mask)})
        decoded = model.decode(encoded, model.embed_queries(side.inputs))
        states = decoded.states
        clock.mark("transformer forward")
        top = states.detach().requires_grad_()
        prediction = model.apply_heads(encoded, dataclasses.replace(decoded, states=top))
        losses = model.losses(prediction, side.inputs)
        total = torch.stack(list(losses.values())).sum()
    clock.mark("heads and losses forward")
    total.backward()
    clock.mark("heads and losses backward")
    states.backward(_gradient(top))
    clock.mark("transformer backward")
    if feature.requires_grad:
        feature.backward(_gradient(cut))
    clock.mark("backbone backward")
    side.update()
    clock.mark("optimizer forward")


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


class _Counting(Clock):
    """Counts operations between the marks instead of seconds."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        super().__init__(torch.device("cpu"))

    def _now(self) -> float:
        return self._counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Counter of floating point operations that knows torch's attention on a CPU, too."""
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flop,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _count_flops(side: Side) -> dict[str, int]:
    with flop_counter() as counter:
        counting = _Counting(counter)
        _step(side, counting)
    return {
        name: sum(int(n) for mark, n in counting.parts.items() if mark.startswith(name))
        for name in PARTS
    }


def _sdpa_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward_flop(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The logits once more, and the four products of the gradients: 2.5 times the forward."""
    return sdpa_flop_count(query, key, value) * 5 // 2


def _optimizer_bytes(side: Side) -> int:
    """Clipping reads each gradient, then reads and writes it; AdamW reads four and writes three."""
    count = sum(p.numel() for p in side.model.parameters() if p.requires_grad)
    return 4 * count * (3 * bool(side.cfg.SOLVER.CLIP_GRADIENTS.ENABLED) + 7)


@torch.no_grad()
def _rates(side: Side) -> dict[str, float]:
    dtype = torch.float32 if side.precision == "float32" else getattr(torch, side.precision)
    a, b = (torch.randn(MATRIX, MATRIX, device=side.device).to(dtype) for _ in range(2))
    picture = a.t().reshape(1, MATRIX, -1, 64).contiguous(memory_format=torch.channels_last)
    kernel = b.reshape(MATRIX, MATRIX, 1, 1)
    source = torch.ones(COPY_MIB * 2**18, device=side.device)
    target = torch.empty_like(source)
    flops = 2 * MATRIX**3
    return {
        "product": flops / _fastest(side, lambda: a @ b),
        "convolution": flops / _fastest(side, lambda: F.conv2d(picture, kernel)),
        "copy": 2 * source.numel() * 4 / _fastest(side, lambda: target.copy_(source)),
    }


def _fastest(side: Side, work: Callable[[], object], repeats: int = 4) -> float:
    """Seconds of the fastest of a few runs, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        clock = Clock(side.device)
        work()
        clock.mark("work")
        seconds.append(clock.parts["work"])
    return min(seconds[1:])
