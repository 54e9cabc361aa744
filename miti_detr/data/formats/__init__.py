"""Labelled images as other tools write them, as COCO JSON.

The readers are our own: of the libraries for this, one shifts Pascal VOC's corners and the other
does not, and neither reads YOLO's polygons together with ``data.yaml``.
"""

from .layouts import Found, find_data
from .write import write_coco_files

__all__ = ["Found", "find_data", "write_coco_files"]
