import pytest

from miti_detr.analysis.bench import child
from tests.analysis.bench.helpers import InlineChild


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children run in this process."""
    monkeypatch.setattr(child, "Child", InlineChild)
