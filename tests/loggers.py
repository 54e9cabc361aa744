"""Detectron2's runs change the loggers of the whole process."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def kept_loggers() -> Iterator[None]:
    """What happens to the loggers inside is undone."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "miti_detr")]
    states = [(list(x.handlers), x.propagate, x.level) for x in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, states, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
