import threading

import pytest
from torch import distributed

from miti_detr.engine.launch.heartbeat import Heartbeat


def _watch(store: distributed.Store, rank: int, world_size: int) -> tuple[Heartbeat, list[str]]:
    lost: list[str] = []
    return Heartbeat(store, rank, world_size, 0.3, lost=lost.append), lost


@pytest.mark.slow
def test_a_silent_process_is_named() -> None:
    """Rank 1 stops counting, rank 2 leaves in order, rank 0 has to say so."""
    store = distributed.HashStore()
    (first, lost), (second, _), (third, _) = (_watch(store, rank, 3) for rank in range(3))
    with first:
        with third:
            second.__enter__()
        threading.Event().wait(0.2)
        second.__exit__(RuntimeError)  # as if it was stopped
        threading.Event().wait(1.0)
    (message,) = lost
    assert "rank 1 (process" in message
    assert "has not answered for 0.005 minutes" in message
    assert "--resume" in message


@pytest.mark.slow
def test_processes_that_answer_stay() -> None:
    store = distributed.HashStore()
    (first, lost), (second, also_lost) = (_watch(store, rank, 2) for rank in range(2))
    with first, second:
        threading.Event().wait(1.0)
    assert lost + also_lost == []
