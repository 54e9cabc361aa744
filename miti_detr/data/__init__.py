"""Data sets, checks, mappers and loaders. Importing this registers the built-in data sets."""

import os

from miti_detr.catalog import REGISTRARS

from .check import check_datasets
from .coco_format import register_coco_format
from .images import ImageError, read_image
from .loader import build_test_loader, build_train_loader
from .mapper import DetrDatasetMapper, build_augmentations
from .panoptic import register_shapes_panoptic
from .panoptic.source import register_panoptic, register_panoptic_format
from .patches import PatchDatasetMapper, build_mapper
from .shapes import register_shapes, render_shapes
from .unlabeled import register_unlabeled

# The same folder as that of Detectron2's own data sets
_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_shapes(_ROOT)
register_shapes_panoptic(_ROOT)

REGISTRARS.extend((register_coco_format, register_panoptic_format, register_unlabeled))

__all__ = [
    "DetrDatasetMapper",
    "ImageError",
    "PatchDatasetMapper",
    "build_augmentations",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "check_datasets",
    "read_image",
    "register_coco_format",
    "register_panoptic",
    "register_panoptic_format",
    "register_shapes",
    "register_shapes_panoptic",
    "register_unlabeled",
    "render_shapes",
]
