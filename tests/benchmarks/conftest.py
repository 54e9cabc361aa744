import pytest

from benchmarks import worker
from tests.benchmarks.helpers import InlineWorker


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the work of workers in this process."""
    monkeypatch.setattr(worker, "Worker", InlineWorker)
    monkeypatch.setattr(worker, "PAUSE", 0)
