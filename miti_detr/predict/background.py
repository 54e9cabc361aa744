"""Iterators that run ahead in threads of their own."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()
_POLL = 0.1  # seconds between looks whether the reader has gone


def in_background(items: Iterable[T], depth: int) -> Iterator[T]:
    """Iterate in another thread, a few items ahead of the reader.

    Order is kept. An exception is raised to the reader in its place. When the reader stops early,
    the thread ends after the item that it is working on, and closes ``items``.

    Args:
        items: used by the other thread only.
        depth: number of items that may wait for the reader.
    """
    waiting: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
    stopped = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, waiting, stopped), daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()


def _fill(items: Iterable[Any], waiting: queue.Queue[Any], stopped: threading.Event) -> None:
    iterator = iter(items)
    try:
        for item in iterator:
            if not _put(waiting, (item, None), stopped):
                return
        _put(waiting, (_END, None), stopped)
    except BaseException as error:
        _put(waiting, (None, error), stopped)
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _put(waiting: queue.Queue[Any], entry: Any, stopped: threading.Event) -> bool:
    while not stopped.is_set():
        try:
            waiting.put(entry, timeout=_POLL)
            return True
        except queue.Full:
            continue
    return False
