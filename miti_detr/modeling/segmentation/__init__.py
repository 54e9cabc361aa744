"""Instance and panoptic masks."""

from .mask_head import AttentionMap, MaskHead
from .panoptic import Segment, confident_queries, merge_panoptic
from .postprocess import RunLengthMasks, published_instance_masks, resize_logits
from .prediction import MaskPrediction
from .segmentation_detr import SegmentationDetr

__all__ = [
    "AttentionMap",
    "MaskHead",
    "MaskPrediction",
    "RunLengthMasks",
    "Segment",
    "SegmentationDetr",
    "confident_queries",
    "merge_panoptic",
    "published_instance_masks",
    "resize_logits",
]
