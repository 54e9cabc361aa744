"""The evaluator of a config."""

import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from .coco import InstanceEvaluator
from .panoptic import PanopticEvaluator
from .patches import PatchEvaluator


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a data set, which need not be in COCO format.

    Of a panoptic data set, things are evaluated as objects if it has an annotation file for them,
    and a panoptic model is evaluated by its panoptic quality.

    Args:
        cfg: reads ``OUTPUT_DIR``, ``TEST.FAST_COCO_EVAL``, ``MODEL.MASK_ON``,
            ``MODEL.DETR.STUFF_CLASSES`` and ``INPUT.PATCHES.NUMBER``; patches, if there are any,
            are the objects.
        dataset_name: a registered data set.
        output_folder: for predictions and results; None: ``OUTPUT_DIR/inference/{dataset_name}``.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    os.makedirs(folder, exist_ok=True)
    fast = cfg.TEST.FAST_COCO_EVAL
    if cfg.INPUT.PATCHES.NUMBER > 0:
        return PatchEvaluator(folder, fast=fast)
    metadata = MetadataCatalog.get(dataset_name)
    is_panoptic = metadata.get("panoptic_json") is not None
    evaluators: list[DatasetEvaluator] = []
    if not is_panoptic or metadata.get("json_file") is not None:
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        evaluators.append(InstanceEvaluator(dataset_name, folder, tasks=tasks, fast=fast))
    if is_panoptic and predicts_panoptic(cfg):
        evaluators.append(PanopticEvaluator(dataset_name, folder))
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def predicts_panoptic(cfg: CfgNode) -> bool:
    """Whether the model of a config returns panoptic segmentations."""
    return bool(cfg.MODEL.MASK_ON and cfg.MODEL.DETR.STUFF_CLASSES)


def best_metric(cfg: CfgNode) -> str:
    """The metric by which the weights of a run are compared, such as ``bbox/AP``.

    Of boxes, masks and panoptic segmentations the last one that the model predicts.
    """
    name = next(iter(cfg.DATASETS.TEST), "")
    is_panoptic = name in DatasetCatalog and MetadataCatalog.get(name).get("panoptic_json")
    if is_panoptic and predicts_panoptic(cfg):
        return "panoptic_seg/PQ"
    return "segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"
