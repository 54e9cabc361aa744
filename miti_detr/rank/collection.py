"""Token matrices between the transformer layers of a model, collected by hooks and measured."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from miti_detr.accelerate import uncompiled
from miti_detr.add_residual import known_layers, layer_input
from miti_detr.layers import DeformableAttention, MultiHeadAttention
from miti_detr.modeling.deformable import DeformableEncoderLayer, Pyramid
from miti_detr.modeling.transformer import EncoderLayer, TransformerDecoder, TransformerLayer

from .measures import attention_entropy, measure_step, measure_tokens

# At most this many tokens are measured, evenly spread. The levels of Deformable-DETR have more.
MOST_TOKENS = 4096

# For each layer of a stack (layer 0 is its input): measure -> value for each image.
LayerMeasures = list[dict[str, list[float]]]


@dataclass
class StackStates:
    """States of the L layers of one stack in a forward pass of N images.

    Attributes:
        states: L + 1 tensors (N, n, C): the input of the first layer, then the output of each.
        keep: (N, n) bool, True = token, False = padding; None if there is no padding.
        entropies: for each layer, name of an attention module -> N values.
        norm: norm applied to each output before the heads, as in DETR's decoder.
    """

    states: list[Tensor] = field(default_factory=list)
    keep: Tensor | None = None
    entropies: list[dict[str, list[float]]] = field(default_factory=list)
    norm: nn.Module | None = None

    def measure(self, normalised: bool = False) -> LayerMeasures:
        """Measure the un-padded tokens of each image.

        Args:
            normalised: whether to measure ``norm(states)``, which exists for layers but not for
                the input.

        Returns:
            L + 1 entries with the measures of :func:`measure_tokens` and, from layer 1 on, of
            :func:`measure_step` and the entropies. If ``normalised``, entry 0 is empty and there
            are no entropies.
        """
        result: LayerMeasures = [{} for _ in self.states]
        for image in range(len(self.states[0])):
            before = None
            for layer, state in enumerate(self.states):
                if normalised and layer == 0:
                    continue
                tokens = state[image] if self.keep is None else state[image][self.keep[image]]
                tokens = _sample(tokens)
                if normalised and self.norm is not None:
                    tokens = self.norm(tokens)
                values = measure_tokens(tokens)
                if before is not None:
                    values |= measure_step(before, tokens)
                for name, value in values.items():
                    result[layer].setdefault(name, []).append(value)
                before = tokens
        for layer, entropies in enumerate([] if normalised else self.entropies, start=1):
            result[layer] |= entropies
        return result


@contextlib.contextmanager
def record_states(model: nn.Module) -> Iterator[dict[str, StackStates]]:
    """While entered, record the states of the transformer layers of a model.

    It records the layers of this package and those that
    :func:`~miti_detr.add_layer_residual` supports. Layers in one list form a
    stack. Attention entropy is recorded only in the layers of this package; that of deformable
    attention is over the points of a query.

    Args:
        model: model, to be run once inside; a second run replaces the states of the first.

    Yields:
        Name of the stack -> its states, filled by the run.
    """
    own = {n: m for n, m in model.named_modules() if isinstance(m, TransformerLayer)}
    stacks: dict[str, StackStates] = {}
    with contextlib.ExitStack() as hooks:
        for name, layer in {**known_layers(model), **own}.items():
            parent, _, _ = name.rpartition(".")
            owner = model.get_submodule(parent.rpartition(".")[0])
            norm = getattr(owner, "layernorm", None)  # of Hugging Face's decoders
            if isinstance(owner, (TransformerDecoder, nn.TransformerDecoder)):
                norm = owner.norm
            recorder = _LayerRecorder(stacks, _short(parent) or type(layer).__name__, name, norm)
            handles = [
                layer.register_forward_pre_hook(recorder.before, with_kwargs=True),
                layer.register_forward_hook(recorder.after),
            ]
            for part, module in layer.named_children():
                if isinstance(module, (MultiHeadAttention, DeformableAttention)):
                    hook = recorder.attention("self" if part == "self_attn" else "cross")
                    handles.append(module.register_forward_pre_hook(hook))
            for handle in handles:
                hooks.callback(handle.remove)
        yield stacks


class _LayerRecorder:
    """The hooks of one layer."""

    def __init__(
        self, stacks: dict[str, StackStates], stack: str, name: str, norm: nn.Module | None
    ) -> None:
        self._stacks, self._stack, self._norm = stacks, stack, norm
        self._first = name.rpartition(".")[2] in ("0", "")
        self._keep: Tensor | None = None
        self._entropies: dict[str, list[float]] = {}

    def before(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Start the stack at its first layer."""
        self._keep, self._entropies = _kept_tokens(layer, args, kwargs), {}
        if self._first or self._stack not in self._stacks:
            x = _tokens(layer, layer_input(args, kwargs))
            self._stacks[self._stack] = StackStates([x], self._keep, norm=self._norm)

    def after(self, layer: nn.Module, args: Any, output: Any) -> None:
        """Record the output."""
        stack = self._stacks[self._stack]
        stack.states.append(_tokens(layer, output[0] if isinstance(output, tuple) else output))
        stack.entropies.append(self._entropies)

    def attention(self, kind: str) -> Any:
        """Return a hook that records the entropies of ``self`` or ``cross`` attention."""

        def before(module: Any, args: tuple[Any, ...]) -> None:
            mask = None
            with torch.no_grad():
                if isinstance(module, DeformableAttention):
                    query, references, _, shapes, *_ = args
                    points = module.sampling_points(query, references, shapes)[1]
                    weights = points.transpose(1, 2).flatten(3).double()
                else:
                    query, key, _, *rest = args
                    mask = rest[0] if rest else None
                    weights = module.weights(query, key, mask).double()
            self._entropies[f"entropy_{kind}"] = [
                float(attention_entropy(rows, _num_keys(mask, image, rows.shape[-1])))
                for image, rows in enumerate(self._rows(weights, kind))
            ]

        return before

    def _rows(self, weights: Tensor, kind: str) -> Iterator[Tensor]:
        """Yield the attention weights (heads, Lq, Lk) of each image, without rows of padding."""
        for image, rows in enumerate(weights):
            keep = self._keep if kind == "self" else None
            yield rows if keep is None else rows[:, keep[image]]


def measure_rank(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, LayerMeasures]:
    """Run a model once in evaluation mode, without gradients, and measure its token matrices.

    Args:
        model: model with transformer layers that :func:`record_states` finds. Its training flags
            are restored afterwards.
        args: positional arguments of its ``forward``.
        kwargs: keyword arguments of its ``forward``.

    Returns:
        Name of the stack (``encoder``, ``decoder``, ``decoder, normalised``, ``backbone.blocks``)
        -> measures of its layers.

    Raises:
        ValueError: no such layer was run.
    """
    with eager_evaluation(model), record_states(model) as stacks:
        model(*args, **kwargs)
    if not stacks:
        raise ValueError(f"{type(model).__name__} ran no transformer layer of a supported kind")
    result = {}
    with torch.no_grad():
        for name, stack in stacks.items():
            result[name] = stack.measure()
            if stack.norm is not None:
                result[f"{name}, normalised"] = stack.measure(normalised=True)
    return result


@contextlib.contextmanager
def eager_evaluation(model: nn.Module) -> Iterator[None]:
    """While entered, evaluate without gradients, and without compiled or fused layers.

    Those would bypass hooks. Afterwards the training flag of every module is restored.
    """
    flags = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, flag in flags:
            module.training = flag


def _tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the tokens of a layer as (N, n, C), whatever its layout."""
    x = x.detach()
    if x.dim() == 4:
        return x.flatten(1, 2)  # (N, h, w, C) of Detectron2's ViT
    if x.dim() == 2:
        return x[None]
    attention = getattr(layer, "self_attn", None)
    return x if getattr(attention, "batch_first", True) else x.transpose(0, 1)


def _kept_tokens(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return (N, n) bool, True = token, from the arguments of an encoder layer."""
    if isinstance(layer, EncoderLayer):
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        return None if mask is None or mask.shape[-2] > 1 else mask[:, 0, 0]
    if isinstance(layer, DeformableEncoderLayer):
        pyramid = next(x for x in (*args, *kwargs.values()) if isinstance(x, Pyramid))
        return None if pyramid.mask is None else ~pyramid.mask
    if type(layer).__module__.startswith("transformers."):
        return _kept_by_attention_mask(args, kwargs)
    padding = kwargs.get("src_key_padding_mask")
    if padding is None:
        return None
    return ~padding if padding.dtype == torch.bool else padding == 0


def _kept_by_attention_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return (N, n) bool from the arguments of an encoder layer of Hugging Face; None in others."""
    if "encoder_hidden_states" in kwargs:
        return None
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is None or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask.bool()
    keys = mask[:, 0, 0]  # the same for every query
    return keys > -1 if keys.is_floating_point() else keys.bool()


def _sample(tokens: Tensor) -> Tensor:
    """Return (n, C), or :data:`MOST_TOKENS` rows of them, evenly spread."""
    if len(tokens) <= MOST_TOKENS:
        return tokens
    index = torch.linspace(0, len(tokens) - 1, MOST_TOKENS, dtype=torch.float64)
    return tokens[index.round().long().to(tokens.device)]


def _num_keys(mask: Tensor | None, image: int, length: int) -> int:
    """Return how many keys a query of an image may attend to."""
    if mask is None:
        return length
    allowed = mask if mask.dtype == torch.bool else mask > -torch.inf
    return int(allowed[min(image, len(allowed) - 1)].sum(dim=-1).max())


def _short(stack: str) -> str:
    """``transformer.encoder.layers`` and ``model.encoder.layers`` -> ``encoder``."""
    return stack.removeprefix("transformer.").removeprefix("model.").removesuffix(".layers")
