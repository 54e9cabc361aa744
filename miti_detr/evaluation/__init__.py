"""Evaluators beside Detectron2's own."""

from .build import build_evaluator
from .coco import BoxEvaluator
from .patches import PatchEvaluator
from .table import coco_table, write_coco_table

__all__ = ["BoxEvaluator", "PatchEvaluator", "build_evaluator", "coco_table", "write_coco_table"]
