"""Weights of many layers folded and cast together.

What it computes: the weights that the layers of a part of the model use in its forward pass: frozen
batch norms folded into convolutions, and autocast's casts. Layer by layer this takes several small
operations for each weight, and as many in the backward pass. Here a few operations on lists of
tensors do it for all layers of the part, and their gradients come back in the same way.

Where: under autocast in training, and on GPUs in inference as well. A part is a stage of the
backbone, or the encoder or decoder; with several processes, the gradients of one part are sent
while those of the next are computed. The weights are made in each forward pass of the part, so that
they are always those of the layers. Not within checkpointed blocks, which run a second time outside
of that forward pass, and not when compiling. A layer computes its own weights where a hook or a
parametrization may change them, where they have changed since the forward pass of the part began,
and where its precision or need of gradients is not that of the part.

How exact: the same roundings as layer by layer.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized

from .exchange import is_recorded
from .kept import version

Pair = tuple[Tensor, Tensor | None]  # weight and bias
_LARGEST = 16_000_000  # parameters of a part, unless it cannot be divided
_DEEPEST = 3  # levels below the model that are searched for parts

# A layer that takes prepared weights has this method. It returns its weight, its bias and the
# frozen batch norm that is folded into them, or None if it computes its own.
SOURCES = "_weights_to_prepare"
_current = threading.local()


class _Made(NamedTuple):
    """What was made for a layer, and the parameters that it was made from."""

    pair: Pair
    sources: list[tuple[Tensor | None, int]]

    def is_valid(self, layer: nn.Module) -> bool:
        """Whether the layer would make the same now."""
        sources = getattr(layer, SOURCES)()
        if sources is None:
            return False
        weight, bias, _ = sources
        made, device = self.pair[0], weight.device.type
        autocast = torch.is_autocast_enabled(device)
        return (
            made.dtype == (torch.get_autocast_dtype(device) if autocast else weight.dtype)
            and (made.requires_grad or not (weight.requires_grad and torch.is_grad_enabled()))
            and all(
                now is then and _changes(now) == changes
                for now, (then, changes) in zip((weight, bias), self.sources, strict=True)
            )
        )


def prepared(layer: nn.Module) -> Pair | None:
    """Weight and bias of a layer in the forward pass of its part; None: it computes its own."""
    # A compiler would watch for changes of what is read
    pairs: dict[int, _Made] | None = None if is_recorded() else getattr(_current, "pairs", None)
    made = None if pairs is None else pairs.get(id(layer))
    return made.pair if made is not None and made.is_valid(layer) else None


@contextmanager
def nothing_prepared() -> Iterator[None]:
    """Let layers compute their own weights, as they do when they run once more."""
    before = getattr(_current, "pairs", None)
    _current.pairs = None
    try:
        yield
    finally:
        _current.pairs = before


@contextmanager
def prepared_within(module: nn.Module) -> Iterator[None]:
    """Prepare the weights of a module here, and not with those of the part that it belongs to."""
    is_in_part = getattr(_current, "pairs", None) is not None
    with nothing_prepared():
        if is_in_part:
            _prepare(module, None)
        yield


def apply(model: nn.Module) -> int:
    """Prepare the weights of the parts below ``model``; return how many parts there are."""
    parts = _parts(model, _DEEPEST)
    for part in parts:
        if not any(hook is _prepare for hook in part._forward_pre_hooks.values()):
            part.register_forward_pre_hook(_prepare)
            part.register_forward_hook(_forget, always_call=True)
    return len(parts)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks other than those of this technique."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return bool(module._backward_hooks) or any(h not in (_prepare, _forget) for h in hooks)


def _parts(module: nn.Module, depth: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        layers = [m for m in child.modules() if hasattr(m, SOURCES)]
        if len(layers) < 2:
            continue
        count = sum(p.numel() for p in child.parameters())
        below = _parts(child, depth - 1) if count > _LARGEST and depth > 1 else []
        found += below or [child]
    return found


def _prepare(part: nn.Module, _: Any) -> None:
    """Make the weights of all layers of a part."""
    if is_recorded():
        return
    layers = [m for m in part.modules() if hasattr(m, SOURCES) and not _may_change(m)]
    first = next((p for layer in layers for p in layer.parameters()), None)
    if first is None:
        return
    device = first.device.type
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters())
    autocast = torch.is_autocast_enabled(device)
    if not (device == "cuda" or (autocast and trained)):
        return
    dtype = torch.get_autocast_dtype(device) if autocast else first.dtype
    found = [(layer, getattr(layer, SOURCES)()) for layer in layers]
    sources = [(layer, *s) for layer, s in found if s and (autocast or s[2] is not None)]
    weights = [w for _, *pair, _ in sources for w in pair if w is not None]
    if not weights or any(w.dtype != torch.float32 or w.device.type != device for w in weights):
        return
    _current.pairs = _make_pairs(sources, dtype)


def _may_change(layer: nn.Module) -> bool:
    """Whether a layer's weights may become others before its own forward pass."""
    return bool(layer._forward_pre_hooks) or is_parametrized(layer)


def _changes(tensor: Tensor | None) -> int:
    return -1 if tensor is None else version(tensor)


def _forget(part: nn.Module, _: Any, __: Any) -> None:
    _current.pairs = None


def _make_pairs(
    sources: list[tuple[nn.Module, Tensor, Tensor | None, Any]], dtype: torch.dtype
) -> dict[int, _Made]:
    folded = [source for source in sources if source[3] is not None]
    plain = [source for source in sources if source[3] is None]
    scales, shifts = _scales_and_shifts([norm for *_, norm in folded])
    weights = [weight for _, weight, *_ in (*folded, *plain)]
    biases = [bias for _, _, bias, _ in plain if bias is not None]
    made = list(_Prepare.apply(dtype, len(folded), *scales, *weights, *biases))
    cast = iter(_cast(shifts, dtype) + made[len(weights) :])
    pairs: dict[int, _Made] = {}
    for (layer, source, bias, norm), weight in zip((*folded, *plain), made, strict=False):
        pair = weight, next(cast) if norm is not None or bias is not None else None
        pairs[id(layer)] = _Made(pair, [(t, _changes(t)) for t in (source, bias)])
    return pairs


@torch.no_grad()
def _scales_and_shifts(norms: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """``scale`` (O, 1, 1, 1) and ``shift`` (O,) of frozen batch norms."""
    if not norms:
        return [], []
    scales = torch._foreach_add([norm.running_var for norm in norms], [n.eps for n in norms])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [norm.weight for norm in norms])
    shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
    shifts = torch._foreach_sub([norm.bias for norm in norms], shifts)
    return [scale[:, None, None, None] for scale in scales], list(shifts)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another precision, side by side in memory, each in the layout of its source."""
    if not tensors or tensors[0].dtype == dtype:
        return tensors
    flat = torch.empty(sum(t.numel() for t in tensors), dtype=dtype, device=tensors[0].device)
    copies, start = [], 0
    for tensor in tensors:
        copies.append(flat.as_strided(tensor.shape, _dense_strides(tensor), start))
        start += tensor.numel()
    torch._foreach_copy_(copies, tensors)
    return copies


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a copy without gaps in the layout of a tensor."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        _, channels, height, width = tensor.shape
        return channels * height * width, 1, channels * width, channels
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class _Prepare(torch.autograd.Function):
    """Scales and casts weights; in the backward pass, their gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the weights.

        Args:
            ctx: of autograd.
            dtype: of the results.
            count: of scales, and of the weights that they belong to.
            tensors: the scales, which have no gradient, and the weights, the scaled ones first.
        """
        scales, weights = list(tensors[:count]), list(tensors[count:])
        ctx.save_for_backward(*scales)
        ctx.dtypes = [w.dtype for w in weights]
        ctx.set_materialize_grads(False)
        scaled = list(torch._foreach_mul(weights[:count], scales)) if count else []
        return tuple(_cast([*scaled, *weights[count:]], dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the weights."""
        scales = ctx.saved_tensors
        used = [index for index, g in enumerate(gradients) if g is not None]
        found = _cast([g for g in gradients if g is not None], ctx.dtypes[0])
        scaled = [index for index in used if index < len(scales)]
        if scaled:
            products = torch._foreach_mul(found[: len(scaled)], [scales[i] for i in scaled])
            found = [*products, *found[len(scaled) :]]
        results: list[Tensor | None] = [None] * len(gradients)
        for index, gradient in zip(used, found, strict=True):
            results[index] = gradient
        return None, None, *(None for _ in scales), *results
