"""Rank collapse at initialisation: the variants of the residual, and pure attention.

Layers, initialisation and sine positions are those of DETR; the input is random.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miti_detr.layers import MultiHeadAttention, SinePositionEncoding
from miti_detr.modeling.transformer import (
    DecoderLayer,
    EncoderLayer,
    LayerResidual,
    TransformerDecoder,
    TransformerEncoder,
)

from .measures import attention_entropy, measure_tokens, relative_residual

Stack = TypeVar("Stack", bound=nn.Module)
Step = Callable[[EncoderLayer, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class TheorySpec:
    """Sizes. The defaults are those of DETR, with the grid of an image of 800 x 1088 pixels.

    Attributes:
        grid: rows and columns of tokens.
        d_model: width.
        nhead: number of attention heads.
        dim_feedforward: hidden width of the feed-forward networks.
        depth: number of layers.
        num_queries: number of object queries.
        seeds: number of seeds that results are averaged over.
    """

    grid: tuple[int, int] = (25, 34)
    d_model: int = 256
    nhead: int = 8
    dim_feedforward: int = 2048
    depth: int = 12
    num_queries: int = 100
    seeds: int = 3

    def encoder(self, seed: int) -> TransformerEncoder:
        """Return post-norm encoder layers with DETR's initialisation."""
        torch.manual_seed(seed)
        layer = EncoderLayer(**self._layer_arguments())
        return _initialised(TransformerEncoder(layer, self.depth, None))

    def transformer(
        self, seed: int, memory_depth: int
    ) -> tuple[TransformerEncoder, TransformerDecoder]:
        """Return a post-norm transformer initialised like the published one with this seed.

        The published decoder layers draw their parts in another order than ours.
        """
        torch.manual_seed(seed)
        encoder = TransformerEncoder(EncoderLayer(**self._layer_arguments()), memory_depth, None)
        parts = _PublishedDecoderParts(self.d_model, self.nhead, self.dim_feedforward)
        published = nn.ModuleList(copy.deepcopy(parts) for _ in range(self.depth))
        _initialised(nn.ModuleList([encoder, published]))
        layer = DecoderLayer(**self._layer_arguments())
        decoder = TransformerDecoder(layer, self.depth, nn.LayerNorm(self.d_model))
        for own, drawn in zip(decoder.layers, published, strict=True):
            own.load_state_dict(drawn.state_dict())
        return encoder, decoder

    def _layer_arguments(self) -> dict[str, Any]:
        return {
            "d_model": self.d_model,
            "nhead": self.nhead,
            "dim_feedforward": self.dim_feedforward,
            "dropout": 0.0,
            "pre_norm": False,
            "layer_residual": "none",
        }

    def positions(self) -> Tensor:
        """Return sine positions (1, n, C)."""
        mask = torch.zeros(1, *self.grid, dtype=torch.bool)
        return SinePositionEncoding(self.d_model // 2)(mask).flatten(2).transpose(1, 2)

    def tokens(self, kind: str, seed: int) -> Tensor:
        """Return random tokens (1, n, C) of unit variance.

        Args:
            kind: ``independent``, or ``shared``: half of the variance is one vector common to all
                tokens, so that their cosines are about 0.5, as in the features of an image.
            seed: seed of the generator.
        """
        tokens, common, _ = self._draw(seed)
        return (0.5**0.5 * (tokens + common) if kind == "shared" else tokens)[None]

    def queries(self, seed: int) -> Tensor:
        """Return random query embeddings (1, Q, C) of unit variance."""
        return self._draw(seed)[2][None]

    def _draw(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1000 + seed)
        sizes = (self.grid[0] * self.grid[1],), (), (self.num_queries,)
        return [torch.randn(*size, self.d_model, generator=generator) for size in sizes]


class _PublishedDecoderParts(nn.Module):
    """Parts of a decoder layer in the order in which the published code makes them."""

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(d_model, nhead)
        self.multihead_attn = MultiHeadAttention(d_model, nhead)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)


def attention_only(layer: EncoderLayer, x: Tensor, pos: Tensor | None) -> Tensor:
    """Apply pure attention, equation (1) of the paper: no skip, feed-forward network or norm."""
    query = x if pos is None else x + pos
    return layer.self_attn(query, query, x)


def attention_and_mlp(layer: EncoderLayer, x: Tensor, pos: Tensor | None) -> Tensor:
    """Apply equations (3) and (4): ``F(A(x))``."""
    return layer.linear2(F.relu(layer.linear1(attention_only(layer, x, pos))))


def _in_layer(placement: str, pre_norm: bool = False) -> Step:
    def step(layer: EncoderLayer, x: Tensor, pos: Tensor | None) -> Tensor:
        layer.pre_norm, layer.residual = pre_norm, LayerResidual(placement)
        return layer(x, pos)

    return step


# One step of each variant, with the weights of one encoder layer.
VARIANTS: dict[str, Step] = {
    "san": attention_only,
    "san_skip": lambda layer, x, pos: x + attention_only(layer, x, pos),
    "none": _in_layer("none"),
    "before_norm": _in_layer("before_norm"),
    "after_norm": _in_layer("after_norm"),
    "pre none": _in_layer("none", pre_norm=True),
    "pre before_norm": _in_layer("before_norm", pre_norm=True),
    "pre after_norm": _in_layer("after_norm", pre_norm=True),
    "eq. 6": lambda layer, x, pos: x + attention_and_mlp(layer, x, pos),
}
DECODER_VARIANTS = tuple(name for name in VARIANTS if name.endswith(("none", "_norm")))

# variant -> layer 0 .. depth -> measure, averaged over the seeds
Panel = dict[str, list[dict[str, float]]]


@torch.no_grad()
def encoder_panel(
    spec: TheorySpec, kind: str, *, variants: Sequence[str] = tuple(VARIANTS)
) -> Panel:
    """Measure the tokens after each encoder layer of each variant, in float32.

    Args:
        spec: sizes.
        kind: kind of input, as in :meth:`TheorySpec.tokens`.
        variants: names in :data:`VARIANTS`.

    Returns:
        The measures of :func:`measure_tokens`, and the attention entropy of the layer as
        ``entropy``. In float32, rounding limits the relative residual to about 1e-7.
    """
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in variants}
    pos = spec.positions()
    for seed in range(spec.seeds):
        layers = spec.encoder(seed).layers
        for name in variants:
            runs[name].append(list(_run_encoder(layers, name, spec.tokens(kind, seed), pos)))
    return {name: _mean(run) for name, run in runs.items()}


def _run_encoder(
    layers: Iterable[Any], variant: str, x: Tensor, pos: Tensor
) -> Iterator[dict[str, float]]:
    yield measure_tokens(x[0])
    entropies: list[float] = []

    def record(attention: nn.Module, args: tuple[Tensor, ...]) -> None:
        weights = layer.self_attn.weights(*args[:2])
        entropies.append(float(attention_entropy(weights, weights.shape[-1])))

    for layer in layers:
        hook = layer.self_attn.register_forward_pre_hook(record)
        x = VARIANTS[variant](layer, x, pos)
        hook.remove()
        yield measure_tokens(x[0]) | {"entropy": entropies[-1]}


@torch.no_grad()
def decoder_panel(
    spec: TheorySpec, *, memory_depth: int = 6, variants: Sequence[str] = DECODER_VARIANTS
) -> Panel:
    """Measure the query states after each decoder layer, before the final norm.

    Args:
        spec: sizes. The states start at zero.
        memory_depth: number of encoder layers of the same variant that compute the memory from
            ``shared`` tokens.
        variants: names in :data:`VARIANTS` that have a decoder.

    Returns:
        As :func:`encoder_panel`, without entropy. Layer 0 is NaN, because its states are zero.
    """
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in variants}
    pos = spec.positions()
    for seed in range(spec.seeds):
        for name in variants:
            pre_norm, placement = name.startswith("pre "), name.removeprefix("pre ")
            memory, query_pos = spec.tokens("shared", seed), spec.queries(seed)
            encoder, decoder = spec.transformer(seed, memory_depth)
            encoder_layers: Any = encoder.layers
            for layer in encoder_layers:
                memory = VARIANTS[name](layer, memory, pos)
            if pre_norm:
                memory = F.layer_norm(memory, memory.shape[-1:])  # the norm after such an encoder
            layers: Any = decoder.layers
            for layer in layers:
                layer.pre_norm, layer.residual = pre_norm, LayerResidual(placement)
            runs[name].append(list(_run_decoder(layers, memory, pos, query_pos)))
    return {name: _mean(run) for name, run in runs.items()}


def _run_decoder(
    layers: Iterable[DecoderLayer], memory: Tensor, pos: Tensor, query_pos: Tensor
) -> Iterator[dict[str, float]]:
    x = torch.zeros_like(query_pos)
    yield measure_tokens(x[0])
    for layer in layers:
        x = layer(x, memory, memory + pos, query_pos)
        yield measure_tokens(x[0])


@torch.no_grad()
def pure_attention(
    spec: TheorySpec, kind: str, *, positions: bool, mlp: bool = False, depth: int = 6
) -> list[float]:
    """Return the relative residual of pure attention in float64, layer by layer.

    Without positions it decreases doubly exponentially, as equation (1) states (with ``mlp``,
    equation (4)): its logarithm grows by a factor of 3 or more per layer. With positions, which
    DETR adds to queries and keys in every layer, attention does not become uniform when the tokens
    become identical, and the residual decreases geometrically, by a factor of about 100 per layer.

    Args:
        spec: sizes.
        kind: kind of input, as in :meth:`TheorySpec.tokens`.
        positions: whether to add sine positions to queries and keys, as DETR does.
        mlp: whether to apply a feed-forward network after each attention.
        depth: number of layers.

    Returns:
        depth + 1 values, starting with the input, averaged over the seeds. Rounding limits them to
        about 1e-16.
    """
    step = attention_and_mlp if mlp else attention_only
    pos = spec.positions().double() if positions else None
    runs = []
    for seed in range(spec.seeds):
        x = spec.tokens(kind, seed).double()
        run = [float(relative_residual(x[0]))]
        layers: Any = spec.encoder(seed).layers[:depth].double()
        for layer in layers:
            x = step(layer, x, pos)
            run.append(float(relative_residual(x[0])))
        runs.append(run)
    return [sum(values) / len(values) for values in zip(*runs, strict=True)]


def _initialised(stack: Stack) -> Stack:
    """Initialise every matrix Xavier-uniform after the layers are cloned, as the model does.

    The result does not depend on whether other stacks exist.
    """
    for parameter in stack.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return stack


def _mean(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Average over the runs, for each layer and measure."""
    return [
        {key: sum(run[key] for run in layer) / len(layer) for key in layer[0]}
        for layer in zip(*runs, strict=True)
    ]
