"""For all tests."""

import logging
from collections.abc import Iterator

import pytest

LOGGERS = [logging.getLogger(name) for name in ("detectron2", "fvcore", "miti_detr")]
AT_START = [(list(x.handlers), x.propagate, x.level) for x in LOGGERS]


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Runs set up the loggers of the whole process, and later tests would log where they did."""
    _restore()  # what fixtures of a module have done
    yield
    _restore()


def _restore() -> None:
    for logger, (handlers, propagate, level) in zip(LOGGERS, AT_START, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
