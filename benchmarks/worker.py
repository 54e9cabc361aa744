"""Measuring in child processes: each has a peak of memory of its own.

What runs in a child is a module-level function; what it keeps between calls stays in the child.
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

from .meters import memory_marks

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Step = Callable[[], dict[str, float]]  # does one step; returns seconds by part

# A child that has just worked lets its threads go to sleep before another one is timed.
PAUSE = 0.05


class Child:
    """A process that lives until the end of the ``with`` block and runs one function at a time."""

    def __init__(self, threads: int) -> None:
        """Start the process.

        Args:
            threads: of torch's operators in it.
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
        """Run a function there and wait for its result; what it raises is raised here."""
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


def in_child(
    threads: int,
    function: Callable[Arguments, Result],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """Run a function in a process of its own."""
    with Child(threads) as child:
        return child.call(function, *args, **kwargs)


@dataclasses.dataclass
class Alternation:
    """What :func:`alternate` measured, by side.

    Attributes:
        prepared: the first value that ``prepare`` returned.
        seconds: part to one value a step.
        memory: see :func:`memory_marks`.
    """

    prepared: dict[str, Any]
    seconds: dict[str, dict[str, list[float]]]
    memory: dict[str, dict[str, float]]


def alternate(
    sides: Sequence[str],
    prepare: Callable[..., tuple[Any, Step]],
    arguments: tuple[Any, ...],
    *,
    threads: int,
    warmup: int,
    repeats: int,
    budget: float = math.inf,
) -> Alternation:
    """Measure steps of several sides in turn, each side in a process of its own.

    Only one process works at a time.

    Args:
        sides: names.
        prepare: called once in each process with the name and ``arguments``; calls
            :func:`start_memory` when all is there that the steps need; returns a value, and the
            function that does a step.
        arguments: see there.
        threads: of torch's operators in each process.
        warmup: steps of each side that are not counted.
        repeats: steps of each side that are.
        budget: begin no further round after so many seconds.
    """
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(threads)) for name in sides}
        prepared = {
            name: child.call(_prepare, prepare, name, arguments) for name, child in children.items()
        }
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
        begin = time.perf_counter()
        for number in range(warmup + repeats):
            if number > warmup and time.perf_counter() - begin > budget:
                break
            for name, child in children.items():
                for part, value in child.call(_step, name).items():
                    if number >= warmup:
                        seconds[name].setdefault(part, []).append(value)
        memory = {name: child.call(memory_marks) for name, child in children.items()}
    return Alternation(prepared, seconds, memory)


def times_as_fast(
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


# What follows runs in the child, and keeps its steps here.
_steps: dict[str, Step] = {}


def _start(threads: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    torch.set_num_threads(threads)


def _run(function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
    """Call a function; its errors become ones that every process can unpickle."""
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
