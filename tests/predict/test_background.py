import threading
from collections.abc import Iterator

import pytest

from miti_detr.predict.background import in_background


def test_order_is_kept_and_another_thread_runs_ahead() -> None:
    main, ahead = threading.get_ident(), threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(20):
            assert threading.get_ident() != main
            if number == 3:
                ahead.set()
            yield number

    items = in_background(numbers(), 4)
    assert next(items) == 0
    assert ahead.wait(10)
    assert list(items) == list(range(1, 20))


def test_an_error_comes_in_its_place() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    items = in_background(failing(), 3)
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)


def test_when_the_reader_stops_the_source_is_closed() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    items = in_background(in_background(endless(), 1), 1)
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert closed.wait(10)
