"""The transformer of DETR: a stack of encoder layers and a stack of decoder layers.

N images, h x w grid of n = h w tokens, Q object queries, L decoder layers, C width.
"""

import copy
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from .layers import DecoderLayer, EncoderLayer
from .residual import placements


class LayerStack(nn.Module):
    """Copies of a layer, one after another, and a final norm, if there is one."""

    def __init__(self, layer: nn.Module, num_layers: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))
        self.norm = norm


class TransformerEncoder(LayerStack):
    """Encoder layers; pre-norm models have a final norm."""

    def forward(self, x: Tensor, pos: Tensor, mask: Tensor | None) -> Tensor:
        """Run all layers: (N, n, C) to (N, n, C); arguments as :meth:`EncoderLayer.forward`."""
        for layer in self.layers:
            x = layer(x, pos, mask)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(LayerStack):
    """Decoder layers, whose final norm is applied to the output of each of them.

    The next layer receives the output without the final norm, also in post-norm models.
    """

    norm: nn.Module

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        pos: Tensor,
        query_pos: Tensor,
        memory_mask: Tensor | None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Run all layers: (N, Q, C) to (L, N, Q, C), normalised.

        Arguments as :meth:`DecoderLayer.forward`; ``pos`` (N, n, C) is the memory's encoding.
        """
        memory_key = memory + pos
        states = []
        for layer in self.layers:
            x = layer(x, memory, memory_key, query_pos, memory_mask, query_mask)
            states.append(x)
        return self.norm(torch.stack(states))


class ResidualTransformer(nn.Module):
    """DETR's transformer with the layer residual as a switch.

    ``layer_residual="none"`` is DETR, ``"before_norm"`` the published Miti-DETR. State-dict keys
    are the published ones: ``encoder.layers.{i}``, ``decoder.layers.{i}``, ``decoder.norm``, and
    ``encoder.norm`` in pre-norm models only.
    """

    @configurable
    def __init__(
        self,
        *,
        d_model: int,
        nhead: int,
        num_encoder_layers: int,
        num_decoder_layers: int,
        dim_feedforward: int,
        dropout: float,
        pre_norm: bool,
        layer_residual: str,
        layer_residual_in: str = "both",
    ) -> None:
        """Make the stacks.

        Args:
            d_model: width C.
            nhead: attention heads; divides ``d_model``.
            num_encoder_layers: 0 is allowed: the memory is then the source itself.
            num_decoder_layers: L, at least 1.
            dim_feedforward: hidden width of the feed-forward networks.
            dropout: probability, in attention weights, sub-layer outputs and feed-forward networks.
            pre_norm: LayerNorm before each sub-layer instead of after it.
            layer_residual: ``none``, ``before_norm`` or ``after_norm``.
            layer_residual_in: ``both``, ``encoder`` or ``decoder``: the stacks that have it.

        Raises:
            ValueError: for values outside these.
        """
        super().__init__()
        if num_encoder_layers < 0 or num_decoder_layers < 1:
            raise ValueError("MODEL.DETR.ENC_LAYERS must be 0 or more, DEC_LAYERS 1 or more")
        shared: dict[str, Any] = {
            "d_model": d_model,
            "nhead": nhead,
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "pre_norm": pre_norm,
        }
        in_encoder, in_decoder = placements(layer_residual, layer_residual_in)
        encoder_layer = EncoderLayer(**shared, layer_residual=in_encoder)
        decoder_layer = DecoderLayer(**shared, layer_residual=in_decoder)
        encoder_norm = nn.LayerNorm(d_model) if pre_norm else None
        self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, encoder_norm)
        self.decoder = TransformerDecoder(decoder_layer, num_decoder_layers, nn.LayerNorm(d_model))
        self.d_model = d_model
        self.nhead = nhead
        self.pre_norm = pre_norm
        self.layer_residual = layer_residual
        self.layer_residual_in = layer_residual_in
        self._reset_parameters()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        """Read ``cfg.MODEL.DETR``."""
        detr = cfg.MODEL.DETR
        return {
            "d_model": detr.HIDDEN_DIM,
            "nhead": detr.NHEADS,
            "num_encoder_layers": detr.ENC_LAYERS,
            "num_decoder_layers": detr.DEC_LAYERS,
            "dim_feedforward": detr.DIM_FEEDFORWARD,
            "dropout": detr.DROPOUT,
            "pre_norm": detr.PRE_NORM,
            "layer_residual": detr.LAYER_RESIDUAL,
            "layer_residual_in": detr.LAYER_RESIDUAL_IN,
        }

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None,
        query_embed: Tensor,
        pos: Tensor,
        query_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode the features and decode the queries.

        Args:
            src: projected features (N, C, h, w).
            mask: (N, h, w) bool, True = padding; ``None`` if nothing is padded, which is faster.
            query_embed: (Q, C), or (N, Q, C).
            pos: position encoding (N, C, h, w).
            query_mask: as in :meth:`DecoderLayer.forward`.

        Returns:
            Decoder states (L, N, Q, C), each after the decoder's final norm, and the encoder
            output ("memory", (N, C, h, w)).
        """
        attend = None if mask is None else ~mask.flatten(1)[:, None, None, :]  # (N, 1, 1, n)
        pos = _tokens(pos)
        memory = self.encoder(_tokens(src), pos, attend)
        query_pos = query_embed.expand(src.shape[0], -1, -1)
        start = torch.zeros_like(query_pos)
        states = self.decoder(start, memory, pos, query_pos, attend, query_mask)
        return states, memory.transpose(1, 2).unflatten(2, src.shape[-2:])

    def _reset_parameters(self) -> None:
        """Xavier-uniform for every matrix, as published; biases stay equal in all layers."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)


def _tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)  # (N, C, h, w) -> (N, n, C), row by row
