"""Registration of the data sets of a config, for pipelines that do not call ours.

Detectron2's own trainer and scripts build the model before the data, so the model registers what
``DATASETS.COCO_FORMAT`` and ``UNLABELED`` define. ``modeling`` does not import ``data``; this
module links them.
"""

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

# Called with a config by register_missing; filled by miti_detr.data
REGISTRARS: list[Callable[[CfgNode], None]] = []


def register_missing(cfg: CfgNode) -> None:
    """Register the data sets that a config defines and uses, unless they are registered already.

    Reads no data.

    Args:
        cfg: reads ``DATASETS``.

    Raises:
        ValueError: a definition is not valid.
    """
    defined = {
        str(entry[0]) for entry in (*cfg.DATASETS.COCO_FORMAT, *cfg.DATASETS.UNLABELED) if entry
    }
    used = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    if any(name not in DatasetCatalog for name in defined & used):
        for register in REGISTRARS:
            register(cfg)
