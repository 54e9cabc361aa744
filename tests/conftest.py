"""For all tests."""

from collections.abc import Iterator

import pytest

from tests.loggers import kept_loggers


@pytest.fixture(autouse=True)
def restored_loggers() -> Iterator[None]:
    """Runs set up the loggers of the whole process, and later tests would log where they did."""
    with kept_loggers():
        yield
