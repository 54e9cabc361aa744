"""Time of the parts of a training step compared with the limits of the machine."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from miti_detr.bench.inputs import autocast
from miti_detr.bench.meters import Clock
from miti_detr.modeling import Feature

from .peers import Peer
from .spec import BenchSpec

MATRIX = 3072  # rows and columns of the matrices whose product gives the rate
COPY_MIB = 256
PARTS = ("backbone", "transformer", "heads and losses", "optimizer")


def bench_roofline(spec: BenchSpec, weights: str) -> dict[str, Any]:
    """Time the parts of training steps, and measure the rates of the machine before and after.

    The backbone, the transformer, and the heads with the losses run forward and backward one after
    the other. The graph is cut between them.

    Args:
        spec: what to measure.
        weights: checkpoint to start from.

    Returns:
        ``rates``: floating point operations per second (a multiply-add counts as two) of a square
        matrix product, computed as a ``product`` and as a 1x1 ``convolution``, which use different
        libraries on a CPU, and bytes per second of a ``copy``. ``parts``: for each part the median
        ``forward`` and ``backward`` in seconds, its ``flops``, and the ``share`` of the better
        matrix rate that it reaches (for the optimizer, of the copy rate). ``step``: seconds of the
        whole step.
    """
    peer = Peer(spec, "ours", weights)
    peer.model.train()
    flops = _count_flops(peer)
    rates = [_rates(peer)]
    clocks = []
    for number in range(spec.warmup + spec.repeats):
        clock = Clock(peer.device)
        _step(peer, clock)
        if number >= spec.warmup:
            clocks.append(clock.parts)
    rates.append(_rates(peer))
    rate = {name: max(r[name] for r in rates) for name in rates[0]}
    return {
        "rates": rate,
        "parts": {name: _part(name, clocks, flops, rate, peer) for name in PARTS},
        "step": statistics.median(sum(parts.values()) for parts in clocks),
    }


def _part(
    name: str,
    clocks: list[dict[str, float]],
    flops: dict[str, int],
    rate: dict[str, float],
    peer: Peer,
) -> dict[str, float]:
    forward, backward = (
        statistics.median(parts.get(f"{name} {way}", 0.0) for parts in clocks)
        for way in ("forward", "backward")
    )
    seconds = forward + backward
    if name == "optimizer":
        share = _optimizer_bytes(peer) / seconds / rate["copy"]
    else:
        best = max(rate["product"], rate["convolution"])
        share = flops[name] / seconds / best
    return {"forward": forward, "backward": backward, "flops": flops.get(name, 0), "share": share}


def _step(peer: Peer, clock: Clock) -> None:
    """Run a training step in parts. Preprocessing counts as part of the backbone."""
    model: Any = peer.model
    with autocast(peer.device, peer.precision):
        images = model.preprocess_image(peer.inputs)
        ((name, (feature, mask)),) = model.backbone(images).items()
        clock.mark("backbone forward")
        cut = feature.detach().requires_grad_()
        encoded = model.encode_features({name: Feature(cut, mask)})
        decoded = model.decode(encoded, model.embed_queries(peer.inputs))
        states = decoded.states
        clock.mark("transformer forward")
        top = states.detach().requires_grad_()
        prediction = model.apply_heads(encoded, dataclasses.replace(decoded, states=top))
        losses = model.losses(prediction, peer.inputs)
        total = torch.stack(list(losses.values())).sum()
    clock.mark("heads and losses forward")
    total.backward()
    clock.mark("heads and losses backward")
    states.backward(_gradient(top))
    clock.mark("transformer backward")
    if feature.requires_grad:
        feature.backward(_gradient(cut))
    clock.mark("backbone backward")
    peer.update()
    clock.mark("optimizer forward")


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


class _Counting(Clock):
    """Counts operations instead of seconds between the marks."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter = counter
        super().__init__(torch.device("cpu"))

    def _now(self) -> float:
        return self._counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Make a counter of operations that also counts the attention of torch on a CPU."""
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flop,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def _count_flops(peer: Peer) -> dict[str, int]:
    with flop_counter() as counter:
        counting = _Counting(counter)
        _step(peer, counting)
    return {
        name: sum(int(n) for mark, n in counting.parts.items() if mark.startswith(name))
        for name in PARTS
    }


def _sdpa_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward_flop(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the recomputed logits and four gradient products: 2.5 times the forward pass."""
    return sdpa_flop_count(query, key, value) * 5 // 2


def _optimizer_bytes(peer: Peer) -> int:
    """Count the bytes of clipping (two reads, one write) and AdamW (four reads, three writes)."""
    count = sum(p.numel() for p in peer.model.parameters() if p.requires_grad)
    return 4 * count * (3 * bool(peer.cfg.SOLVER.CLIP_GRADIENTS.ENABLED) + 7)


@torch.no_grad()
def _rates(peer: Peer) -> dict[str, float]:
    dtype = torch.float32 if peer.precision == "float32" else getattr(torch, peer.precision)
    a, b = (torch.randn(MATRIX, MATRIX, device=peer.device).to(dtype) for _ in range(2))
    picture = a.t().reshape(1, MATRIX, -1, 64).contiguous(memory_format=torch.channels_last)
    kernel = b.reshape(MATRIX, MATRIX, 1, 1)
    source = torch.ones(COPY_MIB * 2**18, device=peer.device)
    target = torch.empty_like(source)
    flops = 2 * MATRIX**3
    return {
        "product": flops / _fastest(peer, lambda: a @ b),
        "convolution": flops / _fastest(peer, lambda: F.conv2d(picture, kernel)),
        "copy": 2 * source.numel() * 4 / _fastest(peer, lambda: target.copy_(source)),
    }


def _fastest(peer: Peer, work: Callable[[], object], repeats: int = 4) -> float:
    """Return the seconds of the fastest of a few runs, after a warm-up."""
    seconds = []
    for _ in range(repeats + 1):
        clock = Clock(peer.device)
        work()
        clock.mark("work")
        seconds.append(clock.parts["work"])
    return min(seconds[1:])
