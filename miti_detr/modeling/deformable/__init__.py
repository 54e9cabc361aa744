"""Deformable-DETR: attention to a few points of several levels of features."""

from .deformable_detr import DeformableDetr, EncodedPyramid
from .layers import DeformableDecoderLayer, DeformableEncoderLayer
from .pyramid import Pyramid
from .transformer import DeformableTransformer

__all__ = [
    "DeformableDecoderLayer",
    "DeformableDetr",
    "DeformableEncoderLayer",
    "DeformableTransformer",
    "EncodedPyramid",
    "Pyramid",
]
