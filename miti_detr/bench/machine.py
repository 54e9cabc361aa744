"""Description of the machine on which something is measured."""

import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "torchvision", "numpy", "scipy", "transformers", "faster-coco-eval")


def describe_machine() -> dict[str, Any]:
    """Describe this machine.

    Returns:
        Processor, number of cores, memory in GiB, GPU (None without one), system, Python, versions
        of packages (None if a package is missing), and the number of cores that other work keeps
        busy.
    """
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
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
    """Measure how many cores other work keeps busy.

    Args:
        seconds: duration of the measurement.

    Returns:
        The number of busy cores; without ``/proc``, the load average of the last minute.
    """
    try:
        before = _cpu_times()
        time.sleep(seconds)
        idle, total = (b - a for a, b in zip(before, _cpu_times(), strict=True))
        return (1 - idle / total) * (os.cpu_count() or 1)
    except (OSError, ZeroDivisionError):
        return os.getloadavg()[0]


def physical_memory() -> int:
    """Return the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_times() -> tuple[int, int]:
    """Return the idle ticks and all ticks of all cores since the machine was started."""
    times = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return times[3] + times[4], sum(times)


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return ""
    return found[1] if found else ""
