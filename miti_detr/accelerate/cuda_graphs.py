"""CUDA graphs: the kernels of a module are recorded once per shape and started by a single call.

What it computes: the same kernels on the same numbers, without the time that the host takes to
start them one by one. The forward and the backward pass of a module are recorded the second time a
shape appears. The recordings of all shapes of a module share one memory pool, because only one of
them works at a time.

Where: on CUDA devices, in training and inference, with autocast and dropout. The module runs
without a graph where hooks of its parts have to be called, and for shapes that appear once.

How exact: the same numbers, except that dropout draws other random numbers.
"""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from .prepared_weights import is_hooked, prepared_within

logger = logging.getLogger(__name__)

MOST_SHAPES = 8  # of a module, of which recordings are kept
_MOST_SEEN = 256  # shapes that are remembered before their second appearance
_WARM_UPS = 3  # runs before a recording, in which cuDNN and cuBLAS choose their kernels


class Recording(Protocol):
    """A recorded module, for arguments of one kind."""

    def is_pending(self) -> bool:
        """Tell whether the backward pass of an earlier call may still come."""

    def __call__(self, tensors: list[Tensor]) -> Any:
        """Compute the output for other tensors of the same shapes."""


class GraphCache:
    """The recordings of one module, the least recently used one first.

    Copies and pickles of it are empty.
    """

    def __init__(self, record: Callable[..., Recording] | None = None) -> None:
        """Start empty.

        Args:
            record: makes a recording; by default by :class:`CudaGraph`.
        """
        self._record = record
        self._recordings: OrderedDict[object, Recording | None] = OrderedDict()
        self._seen: OrderedDict[object, None] = OrderedDict()
        self._pool: Any = None
        self._warned = False

    def run(self, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Compute ``function(*args)``, from a recording if there is one.

        Args:
            module: whose parameters and buffers the function uses.
            function: takes tensors and Nones.
            args: of the function.
        """
        key = _key(module, args)
        if key not in self._recordings:
            if key not in self._seen:
                _remember(self._seen, key, _MOST_SEEN)
                return function(*args)
            self._recordings[key] = self._try_to_record(module, function, args)
            if len(self._recordings) > MOST_SHAPES:
                self._recordings.popitem(last=False)
                self._warn()
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        # A replay overwrites what the backward pass of an earlier one needs, of any shape.
        busy = any(other is not None and other.is_pending() for other in self._recordings.values())
        return function(*args) if recording is None or busy else recording(_tensors(args))

    def _try_to_record(
        self, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> Recording | None:
        if self._record is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            return (self._record or CudaGraph)(module, function, args, self._pool)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("MODEL.CUDA_GRAPHS: a module runs without a graph: %s", reason)
            return None

    def _warn(self) -> None:
        if not self._warned:
            logger.warning(
                "MODEL.CUDA_GRAPHS keeps the graphs of %d shapes, and the batches have more. "
                "Raise MODEL.DETR.SIZE_DIVISIBILITY so that they have fewer",
                MOST_SHAPES,
            )
        self._warned = True

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Copy or pickle as an empty one."""
        return GraphCache, (self._record,)


class _Graphed:
    """Changes how a module runs on a CUDA device, when put before its class."""

    training: bool
    _graphs: GraphCache

    def forward(self, *args: Any) -> Any:
        """Run the module, from a recording where that is possible."""
        forward = super().forward  # type: ignore[misc]

        def run(*args: Any) -> Any:
            # What is made from weights has to be made within the recording.
            with prepared_within(self):  # type: ignore[arg-type]
                return forward(*args)

        if not _is_possible(self, args):  # type: ignore[arg-type]
            return run(*args)
        return self._graphs.run(self, run, args)  # type: ignore[arg-type]


def use_cuda_graphs(module: nn.Module, record: Callable[..., Recording] | None = None) -> None:
    """Let a module run from CUDA graphs where its input is on a CUDA device.

    The module takes tensors or None by position, and returns tensors in tuples, lists or dicts. The
    shapes of the output depend on those of the input only, and nothing in it waits for the device.
    State-dict keys stay as they are.

    Args:
        module: changed in place.
        record: see :class:`GraphCache`; with one, any device is used.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (_Graphed, kind), {})
    module._graphs = GraphCache(record)  # type: ignore[assignment]
    logger.info("CUDA graphs: %s", kind.__name__)


class CudaGraph:
    """Forward and backward pass of a function as two CUDA graphs.

    Source: the method of ``torch.cuda.make_graphed_callables``. In addition, arguments may be None,
    inference has no backward pass, and gradients of parameters are copied, so that several backward
    passes can be accumulated.
    """

    def __init__(
        self, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], pool: Any
    ) -> None:
        """Record.

        Args:
            module: whose parameters the function uses.
            function: takes tensors and Nones.
            args: of the function; their shapes, types and need of gradients are those of all calls.
            pool: memory pool, shared with other recordings that never work at the same time.

        Raises:
            RuntimeError: the function cannot be recorded.
        """
        copies = [
            a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
            for a in args
        ]
        self.inputs = _tensors(copies)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        with _without_autocast_cache():
            self._warm_up(function, copies)
            self.forward_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward_graph, pool=pool):
                outputs = function(*copies)
        self.pending: weakref.ref[Any] | None = None
        self.outputs, self.structure = pytree.tree_flatten(outputs)
        self.gradients = [torch.empty_like(y) for y in self.outputs if y.requires_grad]
        self.backward_graph = None
        if self.gradients:
            self.backward_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.backward_graph, pool=pool):
                self.results = self._backward(self.outputs)

    def __call__(self, tensors: list[Tensor]) -> Any:
        """Replay for other tensors; the output is overwritten by the next call in inference."""
        if self.backward_graph is None:
            self.replay(tensors)
            return pytree.tree_unflatten([y.clone() for y in self.outputs], self.structure)
        outputs = _Replay.apply(self, len(tensors), *tensors, *self.parameters)
        return pytree.tree_unflatten(list(outputs), self.structure)

    def is_pending(self) -> bool:
        """Tell whether the backward pass of an earlier call may still come."""
        return self.pending is not None and self.pending() is not None

    def replay(self, tensors: list[Tensor]) -> None:
        """Run the forward graph."""
        torch._foreach_copy_([x.detach() for x in self.inputs], [x.detach() for x in tensors])
        self.forward_graph.replay()

    def replay_backward(self, gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Run the backward graph; return the gradients of inputs and parameters."""
        assert self.backward_graph is not None
        given = [g for g, y in zip(gradients, self.outputs, strict=True) if y.requires_grad]
        torch._foreach_copy_(self.gradients, given)
        self.backward_graph.replay()
        self.pending = None
        found = [result for result in self.results if result is not None]
        copies = iter(torch._foreach_add(found, 0) if found else ())
        results = iter([None if result is None else next(copies) for result in self.results])
        needed = [*(x.requires_grad for x in self.inputs), *(True for _ in self.parameters)]
        return [next(results) if need else None for need in needed]

    def _warm_up(self, function: Callable[..., Any], copies: list[Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                outputs = pytree.tree_leaves(function(*copies))
                if any(y.requires_grad for y in outputs):
                    self.gradients = [torch.zeros_like(y) for y in outputs if y.requires_grad]
                    self._backward(outputs)
        torch.cuda.current_stream().wait_stream(stream)

    def _backward(self, outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            [y for y in outputs if y.requires_grad],
            [*(x for x in self.inputs if x.requires_grad), *self.parameters],
            self.gradients,
            allow_unused=True,
        )


class _Replay(torch.autograd.Function):
    """Runs the two graphs in the place of the recorded function."""

    @staticmethod
    def forward(ctx: Any, recording: CudaGraph, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs for the first ``count`` tensors; the others are parameters."""
        ctx.recording = recording
        recording.pending = weakref.ref(ctx)
        recording.replay(list(tensors[:count]))
        outputs = tuple(y.detach() for y in recording.outputs)
        pairs = zip(outputs, recording.outputs, strict=True)
        ctx.mark_non_differentiable(*(y for y, made in pairs if not made.requires_grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of inputs and parameters."""
        return None, None, *ctx.recording.replay_backward(gradients)


def _key(module: nn.Module, args: tuple[Any, ...]) -> object:
    """What a recording depends on, except for the values of tensors."""
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cuda")
    precision = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    kinds = tuple(
        (a.shape, a.dtype, a.stride(), a.requires_grad) if isinstance(a, Tensor) else None
        for a in args
    )
    tensors = (*module.parameters(), *module.buffers())
    weights = tuple((t.data_ptr(), t.dtype, t.requires_grad) for t in tensors)
    modes = tuple(part.training for part in module.modules())
    return kinds, torch.is_grad_enabled(), precision, hash(weights), hash(modes)


def _is_possible(module: nn.Module, args: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    tensors = _tensors(args)
    on_device = module._graphs._record is not None or all(x.is_cuda for x in tensors)  # type: ignore[union-attr]
    # Hooks of the module itself are called outside of its forward pass.
    hooked = any(is_hooked(part) for part in module.modules() if part is not module)
    return bool(tensors) and on_device and not hooked


def _tensors(args: Any) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def _remember(seen: OrderedDict[object, None], key: object, limit: int) -> None:
    seen[key] = None
    if len(seen) > limit:
        seen.popitem(last=False)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast would keep casts that were made outside of a recording, or made in it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
