"""Noticing a process that was stopped or whose machine was lost."""

import contextlib
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from torch import distributed

LOST = 1  # exit status
_LEFT = -(2**40)  # of a process that has left the run


class Heartbeat:
    """While entered, tells the other processes that this one is alive, and watches them.

    A collective operation waits for its slowest process and cannot say which one that is. So each
    process counts up a number in the shared store, in a separate thread, and a number that does
    not change for ``timeout`` ends the run. A process that is busy, in an evaluation for example,
    still counts.

    Time is counted in rounds of the watching thread, so that suspending a whole run and continuing
    it later is no reason to end it.
    """

    def __init__(
        self,
        store: distributed.Store,
        rank: int,
        world_size: int,
        timeout: float,
        *,
        lost: Callable[[str], object] | None = None,
    ) -> None:
        """Take the shared store.

        Args:
            store: of the process group; cloned, because a waiting client blocks its other users.
            rank: of this process.
            world_size: number of processes.
            timeout: seconds, more than 0.
            lost: called with a message when a process is missing; None: write it to standard error
                and end this process at once, because its main thread may wait for ever.
        """
        self._store: distributed.Store | None
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank = rank
        self._timeout = timeout
        self._interval = min(5.0, timeout / 5)
        self._lost = lost or self._leave
        self._silent = dict.fromkeys((r for r in range(world_size) if r != rank), 0.0)
        self._counts: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._store_silent = 0.0
        self._leaves_well = True
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        assert self._store is not None
        self._store.set(f"name/{self._rank}", this_process())
        self._beating.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._leaves_well = kind is None
        self._ended.set()
        self._beating.join(1.0)

    def _beat(self) -> None:
        """Count, and look at the counts of the others; blocks while the store does not answer."""
        store = self._store
        assert store is not None
        try:
            while not self._ended.wait(self._interval):
                store.add(f"beat/{self._rank}", 1)
                for rank in self._silent:
                    count = store.add(f"beat/{rank}", 0)
                    if count != self._counts.get(rank) or count < 0:
                        self._counts[rank], self._silent[rank] = count, 0.0
                    if rank not in self._names and store.check([f"name/{rank}"]):
                        self._names[rank] = store.get(f"name/{rank}").decode()
                self._store_silent = 0.0
            if self._leaves_well:
                store.add(f"beat/{self._rank}", _LEFT)
        except RuntimeError:  # the store is gone; the watching thread counts how long
            return

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self._store_silent += self._interval
            for rank in self._silent:
                self._silent[rank] += self._interval
                if self._silent[rank] >= self._timeout and self._store_silent < self._timeout / 2:
                    name = self._names.get(rank, "which has not started")
                    self._lost(self._message(f"rank {rank} ({name})"))
                    return
            if self._store_silent >= self._timeout * 1.2:
                self._store = None  # it would block
                self._lost(self._message("the launcher, or the machine of rank 0,"))
                return

    def _message(self, who: str) -> str:
        return (
            f"{who} has not answered for {self._timeout / 60:.3g} minutes: it was stopped or its "
            "machine is lost. Start the command again with --resume."
        )

    def _leave(self, message: str) -> NoReturn:
        tell_once(self._store, message)
        for process in multiprocessing.active_children():
            process.kill()  # else workers of a data loader may still report a broken pipe
        os._exit(LOST)


def tell_once(store: distributed.Store | None, message: str) -> None:
    """Write an error to standard error, unless another process of the run has written one.

    Args:
        store: of the process group; None: there is only this process.
        message: in one line.
    """
    first = True
    if store is not None:
        with contextlib.suppress(RuntimeError):  # the store is gone
            first = store.add("told", 1) == 1
    if first:
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()


def this_process() -> str:
    """Name this process and its machine."""
    return f"process {os.getpid()} on {socket.gethostname()}"
