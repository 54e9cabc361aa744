"""Evaluators beside Detectron2's own."""

from .coco import BoxEvaluator, build_evaluator
from .table import coco_table, write_coco_table

__all__ = ["BoxEvaluator", "build_evaluator", "coco_table", "write_coco_table"]
