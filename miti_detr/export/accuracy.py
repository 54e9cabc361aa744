"""AP of a model and of its export, on the same images in the same batches."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Boxes, Instances
from torch import nn

from miti_detr.catalog import register_missing
from miti_detr.data import build_test_loader
from miti_detr.evaluation.build import build_evaluator
from miti_detr.predict.backends import Item, SessionBackend, with_pixels

BATCH_SIZE = 4  # with padding, as in production

Detector = Callable[[list[Item]], list[dict[str, Any]]]


def check_dataset(cfg: CfgNode, dataset: str) -> None:
    """Check that AP can be measured on a data set, before long work.

    Raises:
        ValueError: it is not registered, or its files are missing.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (dataset,)
    register_missing(cfg)
    reason = "it is not registered"
    if dataset in DatasetCatalog:
        try:
            DatasetCatalog.get(dataset)
        except OSError as error:
            reason = str(error)
        else:
            return
    raise ValueError(
        f"the difference of AP cannot be measured on the data set {dataset!r}: {reason}. Name "
        "another one with --dataset."
    )


def average_precision(
    detect: Detector, cfg: CfgNode, dataset: str, *, masks: bool = False
) -> dict[str, float]:
    """Evaluate a detector in batches of :data:`BATCH_SIZE`.

    Args:
        detect: Detectron2's inputs to ``{"instances": Instances}`` for each.
        cfg: of the model.
        dataset: a registered data set.
        masks: evaluate masks as well.

    Returns:
        COCO's ``AP`` of boxes and, with masks, ``mask AP``, in 0..100.

    Raises:
        ValueError: as :func:`check_dataset`.
    """
    check_dataset(cfg, dataset)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.IMS_PER_BATCH = BATCH_SIZE
    cfg.MODEL.MASK_ON = masks
    cfg.MODEL.DETR.STUFF_CLASSES = []  # segments are not exported
    with tempfile.TemporaryDirectory() as folder:
        loader = build_test_loader(cfg, dataset)
        evaluator = build_evaluator(cfg, dataset, folder)
        results = inference_on_dataset(detect, loader, evaluator)
    names = {"bbox": "AP", "segm": "mask AP"}
    return {name: float(results[task]["AP"]) for task, name in names.items() if task in results}


def eager_detector(model: nn.Module) -> Detector:
    """The model itself."""

    def detect(items: list[Item]) -> list[dict[str, Any]]:
        with torch.no_grad():
            return list(model(items))

    return detect


def session_detector(backend: SessionBackend) -> Detector:
    """An exported model; a model of one shape resizes the images again."""

    def detect(items: list[Item]) -> list[dict[str, Any]]:
        return [
            {"instances": _instances(found, item)}
            for found, item in zip(backend.detect(_fitting(backend, items)), items, strict=True)
        ]

    return detect


def _fitting(backend: SessionBackend, items: Sequence[Item]) -> list[Item]:
    if backend.record.static_shape is None:
        return list(items)
    fitting = []
    for item in items:
        image = item["image"].permute(1, 2, 0).numpy()
        fitting.append({**backend.prepare(image), "height": item["height"], "width": item["width"]})
    return fitting


def _instances(found: Any, item: Item) -> Instances:
    boxes, scores, classes = (torch.from_numpy(array) for array in found[:3])
    size = (item["height"], item["width"])
    instances = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
    masks = with_pixels(found).masks
    if masks is not None:
        instances.pred_masks = torch.from_numpy(masks)
    return instances
