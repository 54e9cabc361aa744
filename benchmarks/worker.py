"""Worker processes for measurements, so that each measurement has its own peak of memory.

A worker runs module-level functions. What a function keeps between calls stays in the worker.
"""

import dataclasses
import math
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch

from miti_detr.bench.meters import memory_marks

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Step = Callable[[], dict[str, float]]  # does one step and returns the seconds of its parts

# Seconds in which the threads of the previous worker go to sleep before the next one is timed.
PAUSE = 0.05


class Worker:
    """A process that runs one function at a time, until the end of the ``with`` block."""

    def __init__(self, threads: int) -> None:
        """Start the process.

        Args:
            threads: number of torch threads.
        """
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _start, (threads,)
        )

    def call(
        self,
        function: Callable[Arguments, Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Run a function in the process and return its result; its exceptions are raised here."""
        time.sleep(PAUSE)
        return self._pool.submit(_run, function, args, kwargs).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()


def in_worker(
    threads: int,
    function: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """Run a function in a new process and return its result."""
    with Worker(threads) as worker:
        return worker.call(function, *args, **kwargs)


@dataclasses.dataclass
class Alternation:
    """Measurements of :func:`alternate`, by peer.

    Attributes:
        prepared: the first value that ``prepare`` returned.
        seconds: name of the part to one value per step.
        memory: see :func:`~miti_detr.bench.meters.memory_marks`.
    """

    prepared: dict[str, Any]
    seconds: dict[str, dict[str, list[float]]]
    memory: dict[str, dict[str, float]]


def alternate(
    peers: Sequence[str],
    prepare: Callable[..., tuple[Any, Step]],
    arguments: tuple[Any, ...],
    *,
    threads: int,
    warmup: int,
    repeats: int,
    budget: float = math.inf,
) -> Alternation:
    """Measure steps of several peers in turn, each peer in its own process.

    Only one process works at a time.

    Args:
        peers: names of the peers.
        prepare: function that is called once in each process, with the name and ``arguments``. It
            builds what the steps need, calls ``start_memory``, and returns a value and the function
            that does one step.
        arguments: further arguments of ``prepare``.
        threads: number of torch threads of each process.
        warmup: number of steps of each peer that are not counted.
        repeats: number of steps of each peer that are counted.
        budget: seconds after which no further round starts.
    """
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(threads)) for name in peers}
        prepared = {
            name: worker.call(_prepare, prepare, name, arguments)
            for name, worker in workers.items()
        }
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in peers}
        begin = time.perf_counter()
        for number in range(warmup + repeats):
            if number > warmup and time.perf_counter() - begin > budget:
                break
            for name, worker in workers.items():
                for part, value in worker.call(_step, name).items():
                    if number >= warmup:
                        seconds[name].setdefault(part, []).append(value)
        memory = {name: worker.call(memory_marks) for name, worker in workers.items()}
    return Alternation(prepared, seconds, memory)


def times_as_fast(
    ours: dict[str, list[float]], other: dict[str, list[float]]
) -> dict[str, dict[str, float]]:
    """Divide the times of another peer by ours, step by step.

    Args:
        ours: name of the part to the seconds of each step.
        other: the same of the other peer; each step was measured right after ours.

    Returns:
        Name of the part to ``median``, ``min`` and ``max`` of the ratios.
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


# The functions below run in the worker, which keeps its steps here.
_steps: dict[str, Step] = {}


def _start(threads: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    torch.set_num_threads(threads)


def _run(function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    """Call a function; turn its exceptions into ones that can be unpickled in any process."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        for kind in (ValueError, OSError, ImportError):
            if isinstance(error, kind):
                raise kind(str(error)) from None
        raise RuntimeError(traceback.format_exc()) from None


def _prepare(
    prepare: Callable[..., tuple[Any, Step]], name: str, arguments: tuple[Any, ...]
) -> Any:
    value, _steps[name] = prepare(name, *arguments)
    return value


def _step(name: str) -> dict[str, float]:
    return _steps[name]()
