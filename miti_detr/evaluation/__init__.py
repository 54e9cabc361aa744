"""Evaluators beside Detectron2's own."""

from .build import best_metric, build_evaluator
from .coco import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .patches import PatchEvaluator
from .table import coco_table, write_coco_table
from .tta import MitiDetrWithTTA, tta_config

__all__ = [
    "InstanceEvaluator",
    "MitiDetrWithTTA",
    "PanopticEvaluator",
    "PatchEvaluator",
    "best_metric",
    "build_evaluator",
    "coco_table",
    "tta_config",
    "write_coco_table",
]
