"""Meters of time and memory, and the description of the machine."""

import os
import time

import pytest
import torch

from miti_detr.bench import machine
from miti_detr.bench.machine import busy_cores, describe_machine
from miti_detr.bench.meters import Clock, memory_marks, start_memory

MIB = 2**20


def test_a_clock_adds_times_of_the_same_name() -> None:
    clock = Clock(torch.device("cpu"))
    for name in ("a", "b", "a"):
        time.sleep(0.01)
        clock.mark(name)
    assert list(clock.parts) == ["a", "b"]
    assert 0.02 <= clock.parts["a"] < 5
    assert clock.parts["b"] >= 0.01


@pytest.mark.slow
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here"
)
def test_the_peak_is_that_since_the_start() -> None:
    """A larger tensor before the start does not count."""
    torch.ones(200 * MIB // 4).sum()
    start_memory()
    torch.ones(50 * MIB // 4).sum()
    marks = memory_marks()
    assert marks["added"] == marks["peak"] - marks["start"] < 150


def test_busy_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """75 of 100 ticks were idle on 4 cores; without /proc, the result is the load average."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    times = iter([(1_000, 5_000), (1_075, 5_100)])
    monkeypatch.setattr(machine, "_cpu_times", lambda: next(times))
    assert busy_cores(0) == 1.0

    def missing() -> None:
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(machine, "_cpu_times", missing)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    assert busy_cores(0) == 1.5


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "busy_cores", lambda: 0.0)
    found = describe_machine()
    assert found["cores"] == os.cpu_count()
    assert found["memory_gib"] > 0
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
