"""Worker processes; the functions here run in them."""

import os
from typing import Any

import pytest
import torch

from benchmarks.worker import Step, Worker, alternate
from miti_detr.bench.meters import memory_marks, start_memory

MIB = 2**20


def where() -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def fail(kind: str) -> None:
    raise {"value": UnicodeEncodeError("a", "b", 0, 1, "bad"), "fault": KeyError("gone")}[kind]


def take(mib: int) -> float:
    """Take memory and release it, after a larger piece that does not count."""
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


@pytest.mark.slow
def test_a_worker_is_another_process() -> None:
    """One start serves several checks: threads, exceptions that cannot be pickled, memory."""
    with Worker(threads=1) as worker:
        process, threads = worker.call(where)
        assert process != os.getpid()
        assert threads == 1
        with pytest.raises(ValueError, match="bad"):
            worker.call(fail, "value")
        with pytest.raises(RuntimeError, match=r"(?s)in fail.*KeyError: 'gone'"):
            worker.call(fail, "fault")
        if os.access("/proc/self/clear_refs", os.W_OK):
            assert 80 <= worker.call(take, 100) < 200
        assert worker.call(where)[0] == process  # the same process


@pytest.mark.slow
def test_peers_take_turns(inline: None, tmp_path: Any) -> None:
    """A B A B, after a warm-up that is not counted."""
    journal = tmp_path / "journal"
    measured = alternate(
        ["ours", "plain"], prepare, (str(journal),), threads=1, warmup=1, repeats=2
    )
    assert [line.split()[0] for line in journal.read_text().splitlines()] == ["ours", "plain"] * 3
    assert measured.seconds == {"ours": {"step": [1.0, 1.0]}, "plain": {"step": [2.0, 2.0]}}
    assert list(measured.prepared) == list(measured.memory) == ["ours", "plain"]


@pytest.mark.slow
def test_no_further_round_after_the_budget(inline: None, tmp_path: Any) -> None:
    """At least one round is counted."""
    measured = alternate(
        ["ours"], prepare, (str(tmp_path / "x"),), threads=1, warmup=2, repeats=9, budget=0.0
    )
    assert measured.seconds == {"ours": {"step": [1.0]}}
