"""Measuring in child processes: each has a peak of memory of its own.

What runs in a child is a module-level function; what it keeps between calls stays in the child.
"""

import multiprocessing
import os
import platform
import re
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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


def _start(threads: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    torch.set_num_threads(threads)


def _run(
    function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Result:
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


def peak_memory() -> float:
    """Most memory that this process has had so far, in MiB."""
    try:
        # Not ru_maxrss first: on Linux that of a new process starts at the size of its parent.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def peak_device_memory(device: torch.device) -> float:
    """Most memory of tensors on a GPU so far, in MiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else 0.0


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory, GPU, versions, load."""
    names = ("torch", "torchvision", "numpy", "scipy", "transformers", "faster-coco-eval")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": _processor() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return found[1] if found else ""
