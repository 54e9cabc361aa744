import pytest

from benchmarks import worker as child
from tests.benchmarks.helpers import InlineChild


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children run in this process."""
    monkeypatch.setattr(child, "Child", InlineChild)
