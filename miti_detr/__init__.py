"""Miti-DETR for Detectron2: DETR with one extra path from a layer's input to its output."""

from . import (
    data,  # registers the data set shapes
    modeling,  # registers the meta-architecture and the backbone builders
)
from .add_residual import add_layer_residual
from .checkpoint import attach_variant
from .config import add_miti_detr_config
from .modeling import deformable, pretrain  # register DeformableDetr and UpDetr
from .modeling.detr import ON_CONSTRUCTION

ON_CONSTRUCTION.append(attach_variant)

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "add_layer_residual",
    "add_miti_detr_config",
    "data",
    "deformable",
    "modeling",
    "pretrain",
]
