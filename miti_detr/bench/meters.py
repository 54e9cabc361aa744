"""Meters of time and memory."""

import contextlib
import gc
import itertools
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


class Clock:
    """Measures the time of the parts of some work.

    On a GPU the marks are events in its own stream, so that the host need not wait for it between
    the parts.

    Attributes:
        device: device of the work.
    """

    def __init__(self, device: torch.device) -> None:
        """Start the clock.

        Args:
            device: device of the work.
        """
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def mark(self, name: str) -> None:
        """Add the time since the previous mark to the part ``name``."""
        self._marks.append((name, self._now()))

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part, by name; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = {}
        for (_, before), (name, now) in itertools.pairwise(self._marks):
            is_event = hasattr(now, "elapsed_time")
            seconds = before.elapsed_time(now) / 1000 if is_event else now - before
            parts[name] = parts.get(name, 0.0) + seconds
        return parts

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


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
