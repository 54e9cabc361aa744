"""The evaluator of a config."""

import os

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from .coco import BoxEvaluator
from .patches import PatchEvaluator


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a data set, which need not be in COCO format.

    Args:
        cfg: reads ``OUTPUT_DIR``, ``TEST.FAST_COCO_EVAL`` and ``INPUT.PATCHES.NUMBER``; patches,
            if there are any, are the objects.
        dataset_name: a registered data set.
        output_folder: for predictions and results; None: ``OUTPUT_DIR/inference/{dataset_name}``.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    os.makedirs(folder, exist_ok=True)
    fast = cfg.TEST.FAST_COCO_EVAL
    if cfg.INPUT.PATCHES.NUMBER > 0:
        return PatchEvaluator(folder, fast=fast)
    return BoxEvaluator(dataset_name, folder, fast=fast)
