"""The transformer and its layer residual."""

from .layers import DecoderLayer, EncoderLayer, TransformerLayer
from .residual import LAYER_RESIDUALS, LayerResidual
from .stack import ResidualTransformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "LAYER_RESIDUALS",
    "DecoderLayer",
    "EncoderLayer",
    "LayerResidual",
    "ResidualTransformer",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerLayer",
]
