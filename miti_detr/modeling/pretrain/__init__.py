"""Pre-training without labels: UP-DETR."""

from .up_detr import PATCH_CLASS, PatchQueries, UpDetr, group_mask

__all__ = ["PATCH_CLASS", "PatchQueries", "UpDetr", "group_mask"]
