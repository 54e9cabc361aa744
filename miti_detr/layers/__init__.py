"""Building blocks of the model, which use torch only: no Detectron2, no config."""

from .attention import MultiHeadAttention, attention_weights
from .boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, generalized_box_iou
from .deformable_attention import DeformableAttention, deformable_attention
from .mlp import MLP
from .padding_mask import PADDING_MASK_RULES, feature_padding_mask
from .position_encoding import (
    LearnedPositionEncoding,
    SinePositionEncoding,
    build_position_encoding,
)
from .precision import at_least_float32

__all__ = [
    "MLP",
    "PADDING_MASK_RULES",
    "DeformableAttention",
    "LearnedPositionEncoding",
    "MultiHeadAttention",
    "SinePositionEncoding",
    "at_least_float32",
    "attention_weights",
    "box_cxcywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "build_position_encoding",
    "deformable_attention",
    "feature_padding_mask",
    "generalized_box_iou",
]
