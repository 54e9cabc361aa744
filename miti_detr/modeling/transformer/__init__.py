"""The transformer and its layer residual."""

from .build import TRANSFORMER_REGISTRY, build_transformer
from .elsewhere import AddedResidual, add_layer_residual, known_layers
from .layers import DecoderLayer, EncoderLayer
from .residual import LAYER_RESIDUAL_STACKS, LAYER_RESIDUALS, LayerResidual
from .stack import ResidualTransformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "LAYER_RESIDUALS",
    "LAYER_RESIDUAL_STACKS",
    "TRANSFORMER_REGISTRY",
    "AddedResidual",
    "DecoderLayer",
    "EncoderLayer",
    "LayerResidual",
    "ResidualTransformer",
    "TransformerDecoder",
    "TransformerEncoder",
    "add_layer_residual",
    "build_transformer",
    "known_layers",
]
