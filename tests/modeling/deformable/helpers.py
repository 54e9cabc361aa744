"""Deformable-DETR for tests."""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from miti_detr import add_miti_detr_config
from tests.fill import fill
from tests.helpers import ROOT, tiny_config

KINDS = {
    "single_scale": (),
    "base": (),
    "refine": ("MODEL.DETR.BOX_REFINEMENT", True),
    "two_stage": ("MODEL.DETR.BOX_REFINEMENT", True, "MODEL.DETR.TWO_STAGE", True),
}


def coco_config(kind: str, *overrides: Any, name: str = "deformable_detr") -> CfgNode:
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/coco/{name}_R50_{kind}_50ep.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    return cfg


def tiny(kind: str = "base", *overrides: Any) -> CfgNode:
    """Three levels (one for ``single_scale``) of 64 channels, two in each group of the norm."""
    single = kind == "single_scale"
    return tiny_config(
        *("MODEL.META_ARCHITECTURE", "DeformableDetr", "MODEL.DETR.CLASS_LOSS", "focal"),
        *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"]),
        *("MODEL.DETR.IN_FEATURES", ["res3"] if single else ["res2", "res3"]),
        *("MODEL.DETR.NUM_FEATURE_LEVELS", 1 if single else 3, "MODEL.DETR.NUM_POINTS", 2),
        *("MODEL.DETR.HIDDEN_DIM", 64, "MODEL.DETR.CLASS_WEIGHT", 2.0),
        *("TEST.DETECTIONS_PER_IMAGE", 5),
        *KINDS[kind],
        *overrides,
    )


def filled_once(official: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of published keys; heads that are one tensor are filled by their first name."""
    refined = any(key.startswith("transformer.decoder.bbox_embed.") for key in official)
    result = {}
    for key, value in official.items():
        name = key.removeprefix("transformer.decoder.") if "_embed." in key else key
        if not refined and name.startswith(("class_embed.", "bbox_embed.")):
            kind, _, rest = name.split(".", 2)
            name = f"{kind}.0.{rest}"
        result[key] = fill(name, tuple(value.shape))
    return result
