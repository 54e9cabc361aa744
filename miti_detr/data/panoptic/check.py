"""Checks of panoptic data sets before a run starts."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from miti_detr.data.object_masks import SEGMENTS

logger = logging.getLogger(__name__)

CheckImages = Callable[[CfgNode, str, Sequence[Mapping[str, Any]]], None]


def check_panoptic(cfg: CfgNode, name: str, check_images: CheckImages) -> int:
    """Check a registered panoptic data set, Detectron2's included.

    Args:
        cfg: of the run.
        name: of the data set.
        check_images: checks that image files exist and have the size that is given for them.

    Returns:
        The number of segments that are no crowds.

    Raises:
        ValueError: the classes are not those of the model, or the annotation file is faulty.
        OSError: a file is missing.
    """
    dicts = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    if not dicts or SEGMENTS not in dicts[0]:
        raise ValueError(
            f"The data set {name!r} has no panoptic images. Of Detectron2's data sets, use those "
            "whose names end in _panoptic"
        )
    _check_classes(cfg, name, metadata)
    check_images(cfg, f"data set {name}", dicts)
    files = [{"file_name": record[SEGMENTS]} for record in dicts]
    check_images(cfg, f"data set {name}", files)
    segments = [s for record in dicts for s in record["segments_info"]]
    objects = sum(not segment.get("iscrowd", 0) for segment in segments)
    logger.info("%s: %d images, %d segments", name, len(dicts), len(segments))
    return objects


def _check_classes(cfg: CfgNode, name: str, metadata: Any) -> None:
    stuff = sorted(metadata.stuff_dataset_id_to_contiguous_id.values())
    things = sorted(metadata.thing_dataset_id_to_contiguous_id.values())
    count = len({*things, *stuff})
    if count < len(things) + len(stuff):
        raise ValueError(
            f"The data set {name!r} numbers things and stuff apart, and DETR has one list of "
            "classes. Register it with DATASETS.COCO_FORMAT"
        )
    if count != cfg.MODEL.DETR.NUM_CLASSES:
        raise ValueError(
            f"{name} has {count} classes of things and stuff, but MODEL.DETR.NUM_CLASSES is "
            f"{cfg.MODEL.DETR.NUM_CLASSES}. Add the override MODEL.DETR.NUM_CLASSES {count}"
        )
    if cfg.MODEL.MASK_ON and list(cfg.MODEL.DETR.STUFF_CLASSES) != stuff:
        raise ValueError(
            f"The stuff classes of {name} are {stuff}, but MODEL.DETR.STUFF_CLASSES is "
            f"{list(cfg.MODEL.DETR.STUFF_CLASSES)}. Add the override "
            f'MODEL.DETR.STUFF_CLASSES "{stuff}"'
        )
