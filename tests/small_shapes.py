"""The built-in data set ``shapes`` with a few images instead of thousands."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from miti_detr.data import register_shapes, render_shapes


@contextlib.contextmanager
def small_shapes(root: Path) -> Iterator[Path]:
    """While entered, ``shapes_train`` (8 images) and ``shapes_val`` (4) are in ``root/shapes``."""
    render_shapes(root / "shapes", num_train=8, num_val=4)
    _register_anew(str(root))
    try:
        yield root / "shapes"
    finally:
        _register_anew(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def _register_anew(root: str) -> None:
    for name in ("shapes_train", "shapes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_shapes(root)
