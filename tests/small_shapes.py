"""The built-in data set ``shapes`` with a few images instead of thousands."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from miti_detr.data import register_shapes, register_shapes_panoptic, render_shapes


@contextlib.contextmanager
def small_shapes(root: Path, num_train: int = 8, num_val: int = 4) -> Iterator[Path]:
    """While entered, ``shapes_train`` and ``shapes_val``, of a few images, are in ``root/shapes``.

    ``shapes_panoptic_train`` and ``_val`` are the same images.
    """
    render_shapes(root / "shapes", num_train, num_val)
    _register_anew(str(root))
    try:
        yield root / "shapes"
    finally:
        _register_anew(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def _register_anew(root: str) -> None:
    for data_set in ("shapes", "shapes_panoptic"):
        for name in (f"{data_set}_train", f"{data_set}_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    register_shapes(root)
    register_shapes_panoptic(root)
