"""The number of classes of a model, by its config."""

import operator

from detectron2.config import CfgNode

OWN_KEY = "MODEL.DETR.NUM_CLASSES"
# Of Detectron2's detectors
_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "PanopticFPN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}


def classes_key(cfg: CfgNode) -> str:
    """Return the key with the number of classes of ``MODEL.META_ARCHITECTURE``."""
    return _KEYS.get(cfg.MODEL.META_ARCHITECTURE, OWN_KEY)


def num_classes(cfg: CfgNode) -> int:
    """Return the number of classes of the model, without "no object"."""
    value: int = operator.attrgetter(classes_key(cfg))(cfg)
    return value
