"""Processes of one's own; the functions here run in them."""

import os
import time
from typing import Any

import pytest
import torch

from benchmarks import meters
from benchmarks.meters import Clock, busy_cores, memory_marks, start_memory
from benchmarks.worker import Child, Step, alternate

MIB = 2**20


def where() -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def fail(kind: str) -> None:
    raise {"value": UnicodeEncodeError("a", "b", 0, 1, "bad"), "fault": KeyError("gone")}[kind]


def take(mib: int) -> float:
    """Memory that is given back at once, after a larger piece that does not count."""
    torch.ones(4 * mib * MIB // 4).sum()
    start_memory()
    torch.ones(mib * MIB // 4).sum()
    return memory_marks()["added"]


def prepare(name: str, journal: str) -> tuple[int, Step]:
    def step() -> dict[str, float]:
        with open(journal, "a") as file:
            file.write(f"{name} {os.getpid()}\n")
        return {"step": 1.0 if name == "ours" else 2.0}

    start_memory()
    return os.getpid(), step


def test_a_process_of_its_own() -> None:
    """One start for several checks: threads, errors that cannot be pickled, memory."""
    with Child(threads=1) as child:
        process, threads = child.call(where)
        assert process != os.getpid()
        assert threads == 1
        with pytest.raises(ValueError, match="bad"):
            child.call(fail, "value")
        with pytest.raises(RuntimeError, match=r"(?s)in fail.*KeyError: 'gone'"):
            child.call(fail, "fault")
        if os.access("/proc/self/clear_refs", os.W_OK):
            assert 80 <= child.call(take, 100) < 200
        assert child.call(where)[0] == process  # the same one lives on


def test_sides_take_turns(inline: None, tmp_path: Any) -> None:
    """A B A B, after a warm-up that is not counted."""
    journal = tmp_path / "journal"
    measured = alternate(
        ["ours", "plain"], prepare, (str(journal),), threads=1, warmup=1, repeats=2
    )
    assert [line.split()[0] for line in journal.read_text().splitlines()] == ["ours", "plain"] * 3
    assert measured.seconds == {"ours": {"step": [1.0, 1.0]}, "plain": {"step": [2.0, 2.0]}}
    assert list(measured.prepared) == list(measured.memory) == ["ours", "plain"]


def test_no_further_round_after_the_budget(inline: None, tmp_path: Any) -> None:
    """At least one round is counted."""
    measured = alternate(
        ["ours"], prepare, (str(tmp_path / "x"),), threads=1, warmup=2, repeats=9, budget=0.0
    )
    assert measured.seconds == {"ours": {"step": [1.0]}}


def test_a_clock_adds_up_what_has_the_same_name() -> None:
    clock = Clock(torch.device("cpu"))
    for name in ("a", "b", "a"):
        time.sleep(0.01)
        clock.mark(name)
    assert list(clock.parts) == ["a", "b"]
    assert 0.02 <= clock.parts["a"] < 0.5
    assert clock.parts["b"] >= 0.01


def test_busy_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 ticks 75 were idle, on 4 cores; with no such file it is the load."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    times = iter([(1_000, 5_000), (1_075, 5_100)])
    monkeypatch.setattr(meters, "_cpu_times", lambda: next(times))
    assert busy_cores(0) == 1.0

    def gone() -> None:
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(meters, "_cpu_times", gone)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    assert busy_cores(0) == 1.5
