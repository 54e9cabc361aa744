"""Panoptic data sets in COCO's format, and the built-in one."""

from .check import check_panoptic
from .shapes import register_shapes_panoptic, render_shapes_panoptic
from .source import PanopticSource, register_panoptic

__all__ = [
    "PanopticSource",
    "check_panoptic",
    "register_panoptic",
    "register_shapes_panoptic",
    "render_shapes_panoptic",
]
