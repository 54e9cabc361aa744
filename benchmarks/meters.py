"""Time, memory and the machine they are measured on."""

import contextlib
import gc
import os
import platform
import re
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


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
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    _memory_at_start = peak_memory()


def memory_marks() -> dict[str, float]:
    """Memory of this process in MiB.

    Returns:
        ``start``: at :func:`start_memory`; ``peak``: the most since then; ``added``: the
        difference; ``device_peak``: the most that tensors on the GPU had since then, 0 without one.
    """
    peak = peak_memory()
    return {
        "start": _memory_at_start,
        "peak": peak,
        "added": peak - _memory_at_start,
        "device_peak": torch.cuda.max_memory_allocated() / MIB
        if torch.cuda.is_available()
        else 0.0,
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


def describe_machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory, GPU, versions, work of others."""
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
        "busy_cores_before": round(busy_cores(), 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores other work keeps busy now; without ``/proc`` the load of the last minute."""
    try:
        before = _cpu_times()
        time.sleep(seconds)
        idle, total = (b - a for a, b in zip(before, _cpu_times(), strict=True))
        return (1 - idle / total) * (os.cpu_count() or 1)
    except (OSError, ZeroDivisionError):
        return os.getloadavg()[0]


def _cpu_times() -> tuple[int, int]:
    """Ticks of all cores since the start of the machine: idle, and all."""
    times = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return times[3] + times[4], sum(times)


def physical_memory() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return found[1] if found else ""
