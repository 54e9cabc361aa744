import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.stub import write_data


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Runs change the loggers of the whole process."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "miti_detr")]
    states = [(list(x.handlers), x.propagate, x.level) for x in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, states, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny data set."""
    folder = tmp_path_factory.mktemp("tiny") / "data"
    write_data(folder)
    return folder


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """The log of this package, also after a run has set up its own handlers."""
    monkeypatch.setattr(logging.getLogger("miti_detr"), "propagate", True)
    caplog.set_level(logging.INFO, logger="miti_detr")
    return caplog
