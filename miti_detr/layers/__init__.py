"""Leaves of the model: torch only, no Detectron2, no config."""

from .attention import MultiHeadAttention
from .boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, generalized_box_iou
from .dropout import Dropout, ReluDropout, dropout, relu_dropout
from .dropout_attention import attention_weights, dropout_attention
from .linear import POINTWISE_DILATION, Linear, linear
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
    "POINTWISE_DILATION",
    "Dropout",
    "LearnedPositionEncoding",
    "Linear",
    "MultiHeadAttention",
    "ReluDropout",
    "SinePositionEncoding",
    "attention_weights",
    "box_cxcywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "build_position_encoding",
    "dropout",
    "dropout_attention",
    "feature_padding_mask",
    "generalized_box_iou",
    "linear",
    "relu_dropout",
]
