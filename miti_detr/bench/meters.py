"""Meters of time and memory."""

import contextlib
import gc
import re
import resource
import sys
import time
from pathlib import Path

import torch

MIB = 2**20


class Clock:
    """Measures the time of the parts of some work.

    Attributes:
        parts: seconds of each part, by name.
        device: device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        """Start the clock.

        Args:
            device: device of the work; the clock waits for it at every mark.
        """
        self.device = device
        self.parts: dict[str, float] = {}
        self._last = self._now()

    def mark(self, name: str) -> None:
        """Add the time since the previous mark to the part ``name``."""
        now = self._now()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


_memory_at_start = 0.0


def start_memory() -> None:
    """Start to measure the peak of this process's memory.

    The peak of a process can be reset on Linux only. Elsewhere it counts from the start of the
    process.
    """
    global _memory_at_start
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    _memory_at_start = peak_memory()


def memory_marks() -> dict[str, float]:
    """Return the memory of this process in MiB.

    Returns:
        ``start``: memory at :func:`start_memory`. ``peak``: maximum since then. ``added``: the
        difference. ``device_peak``: maximum of the memory of tensors on the GPU since then, 0
        without a GPU.
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
    """Return the peak memory of this process in MiB."""
    try:
        # ru_maxrss of a new process starts at the size of its parent on Linux.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024
