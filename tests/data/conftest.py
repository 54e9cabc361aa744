from collections.abc import Iterator

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog


@pytest.fixture(autouse=True)
def _restore_catalogs() -> Iterator[None]:
    """Unregister what a test registered, and bring back what it removed."""
    saved = [(catalog, dict(catalog)) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, content in saved:
        catalog.clear()
        catalog.update(content)
