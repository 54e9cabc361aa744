"""Leaves of the model: torch only, no Detectron2, no config."""

from .attention import MultiHeadAttention
from .boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, generalized_box_iou
from .dropout import Dropout, dropout
from .mlp import MLP
from .padding_mask import PADDING_MASK_RULES, feature_padding_mask
from .position_encoding import (
    LearnedPositionEncoding,
    SinePositionEncoding,
    build_position_encoding,
)

__all__ = [
    "MLP",
    "PADDING_MASK_RULES",
    "Dropout",
    "LearnedPositionEncoding",
    "MultiHeadAttention",
    "SinePositionEncoding",
    "box_cxcywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "build_position_encoding",
    "dropout",
    "feature_padding_mask",
    "generalized_box_iou",
]
