"""The transformer and its layer residual."""

from .add_residual import AddedResidual, add_layer_residual, known_layers
from .layers import DecoderLayer, EncoderLayer
from .residual import LAYER_RESIDUAL_STACKS, LAYER_RESIDUALS, LayerResidual
from .stack import ResidualTransformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "LAYER_RESIDUALS",
    "LAYER_RESIDUAL_STACKS",
    "AddedResidual",
    "DecoderLayer",
    "EncoderLayer",
    "LayerResidual",
    "ResidualTransformer",
    "TransformerDecoder",
    "TransformerEncoder",
    "add_layer_residual",
    "known_layers",
]
