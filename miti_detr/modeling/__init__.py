"""The model: backbone, transformer with the layer residual, set prediction, set loss."""

from .backbones.masked_backbone import Feature, MaskedBackbone
from .backbones.resnet import build_detr_resnet_backbone
from .backbones.timm import TimmBackbone, build_timm_backbone
from .backbones.vision_transformers import build_swin_backbone, build_vit_backbone
from .criterion import SetCriterion
from .detr import MitiDetr
from .matcher import HungarianMatcher
from .postprocess import detections
from .segmentation import SegmentationDetr
from .stages import SetPrediction
from .targets import Target, targets_from_instances
from .transformer import ResidualTransformer

__all__ = [
    "Feature",
    "HungarianMatcher",
    "MaskedBackbone",
    "MitiDetr",
    "ResidualTransformer",
    "SegmentationDetr",
    "SetCriterion",
    "SetPrediction",
    "Target",
    "TimmBackbone",
    "build_detr_resnet_backbone",
    "build_swin_backbone",
    "build_timm_backbone",
    "build_vit_backbone",
    "detections",
    "targets_from_instances",
]
