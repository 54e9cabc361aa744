"""Mapper, loaders, checks and registration; importing it registers the data set ``shapes``."""

import os

from .check import check_datasets
from .coco_format import register_coco_format
from .loader import build_test_loader, build_train_loader
from .mapper import DetrDatasetMapper, build_augmentations
from .patches import PatchDatasetMapper, build_mapper
from .shapes import register_shapes, render_shapes
from .unlabeled import register_unlabeled

# Registers; the same folder as that of Detectron2's own data sets.
register_shapes(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))

__all__ = [
    "DetrDatasetMapper",
    "PatchDatasetMapper",
    "build_augmentations",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "check_datasets",
    "register_coco_format",
    "register_shapes",
    "register_unlabeled",
    "render_shapes",
]
