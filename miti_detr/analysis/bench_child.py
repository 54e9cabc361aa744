"""Measuring in child processes: each has a peak of memory of its own.

What runs in a child is a module-level function; what it keeps between calls stays in the child.
"""

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MIB = 2**20
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
        prepared: what ``prepare`` returned.
        seconds: part to one value a step.
        memory: MiB of the process before the steps (``start``) and at most (``peak``), and on a GPU
            of tensors (``device_peak``).
    """

    prepared: dict[str, Any]
    seconds: dict[str, dict[str, list[float]]]
    memory: dict[str, dict[str, float]]


def alternate(
    sides: Sequence[str],
    prepare: Callable[..., Any],
    step: Callable[[], dict[str, float]],
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
            :func:`start_memory` when all is there that the steps need.
        step: called there for each step; returns seconds by part.
        arguments: see there.
        threads: of torch's operators in each process.
        warmup: steps of each side that are not counted.
        repeats: steps of each side that are.
        budget: begin no further round after so many seconds.
    """
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(threads)) for name in sides}
        prepared = {name: child.call(prepare, name, *arguments) for name, child in children.items()}
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
        begin = time.perf_counter()
        for number in range(warmup + repeats):
            if number > warmup and time.perf_counter() - begin > budget:
                break
            for name, child in children.items():
                for part, value in child.call(step).items():
                    if number >= warmup:
                        seconds[name].setdefault(part, []).append(value)
        memory = {name: child.call(_memory) for name, child in children.items()}
    return Alternation(prepared, seconds, memory)


def pair_ratios(
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


class Clock:
    """Seconds of the parts of a piece of work.

    Attributes:
        parts: name to seconds.
    """

    def __init__(self, device: torch.device) -> None:
        """Start; ``device`` is waited for at every mark."""
        self._device = device
        self.parts: dict[str, float] = {}
        self._last = self._now()

    def mark(self, name: str) -> None:
        """Add the time since the last mark to the part ``name``."""
        now = self._now()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


_memory_at_start = 0.0


def start_memory() -> None:
    """Count the peak of this process' memory from here, where Linux allows it."""
    global _memory_at_start
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    _memory_at_start = peak_memory()


def _memory() -> dict[str, float]:
    return {
        "start": _memory_at_start,
        "peak": peak_memory(),
        "device_peak": peak_device_memory(),
    }


def peak_memory() -> float:
    """Most memory that this process has had, in MiB."""
    try:
        # Not ru_maxrss first: on Linux that of a new process starts at the size of its parent.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def peak_device_memory() -> float:
    """Most memory of tensors on the GPU so far, in MiB; 0 without one."""
    return torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory, GPU, versions, load."""
    names = ("torch", "torchvision", "numpy", "scipy", "transformers", "faster-coco-eval")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(physical_memory() / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def physical_memory() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return found[1] if found else ""
