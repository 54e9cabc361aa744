"""Encoder and decoder layer of Deformable-DETR, with the layer residual.

N images, S tokens of all levels, Q object queries, C width. Both layers are post-norm. Position
terms are added to the queries of attention, never to values.
State-dict keys are those of fundamentalvision/Deformable-DETR ``models/deformable_transformer.py``
at 11169a6, where the norm after self-attention of the decoder is the second one.
"""

import dataclasses

from torch import Tensor, nn

from miti_detr.layers import DeformableAttention
from miti_detr.modeling.transformer import TransformerLayer

from .pyramid import Pyramid


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """What both layers have in common.

    Attributes:
        d_model: width C.
        nhead: attention heads; divides ``d_model``.
        num_levels: levels of features.
        num_points: points that a head reads on each level.
        dim_feedforward: hidden width of the feed-forward networks.
        dropout: probability, in attention weights of the queries, sub-layer outputs and
            feed-forward networks.
    """

    d_model: int
    nhead: int
    num_levels: int
    num_points: int
    dim_feedforward: int
    dropout: float

    def make_attention(self) -> DeformableAttention:
        """Make deformable attention of these sizes."""
        return DeformableAttention(
            self.d_model, self.nhead, num_levels=self.num_levels, num_points=self.num_points
        )


class DeformableEncoderLayer(TransformerLayer):
    """Deformable attention among the tokens of an image, then the feed-forward network."""

    self_attn: DeformableAttention

    def __init__(self, sizes: LayerSizes, *, layer_residual: str) -> None:
        """Make the layer; ``layer_residual`` is ``none`` or ``before_norm``."""
        super().__init__(
            d_model=sizes.d_model,
            nhead=sizes.nhead,
            dim_feedforward=sizes.dim_feedforward,
            dropout=sizes.dropout,
            pre_norm=False,
            layer_residual=layer_residual,
            self_attn=sizes.make_attention(),
        )

    def forward(self, x: Tensor, pos: Tensor, references: Tensor, pyramid: Pyramid) -> Tensor:
        """Run the layer.

        Args:
            x: tokens (N, S, C).
            pos: position encoding (N, S, C).
            references: (N, S, levels, 2) place of each token on each padded level.
            pyramid: where the tokens lie.

        Returns:
            (N, S, C).
        """
        attended = self.self_attn(x + pos, references, x, pyramid.shapes, pyramid.mask)
        y = self.norm1(x + self.dropout(attended))
        return self.residual.finish_post_norm(x, y + self._feed_forward(y), self.norm2)


class DeformableDecoderLayer(TransformerLayer):
    """Self-attention of the queries, deformable attention to the tokens, feed-forward network."""

    def __init__(self, sizes: LayerSizes, *, layer_residual: str) -> None:
        """Make the layer; ``layer_residual`` is ``none`` or ``before_norm``."""
        super().__init__(
            d_model=sizes.d_model,
            nhead=sizes.nhead,
            dim_feedforward=sizes.dim_feedforward,
            dropout=sizes.dropout,
            pre_norm=False,
            layer_residual=layer_residual,
        )
        self.cross_attn = sizes.make_attention()
        self.norm3 = nn.LayerNorm(sizes.d_model)

    def forward(
        self, x: Tensor, query_pos: Tensor, references: Tensor, memory: Tensor, pyramid: Pyramid
    ) -> Tensor:
        """Run the layer.

        Args:
            x: query states (N, Q, C).
            query_pos: query embeddings (N, Q, C).
            references: (N, Q, levels, 2 or 4) point or box of each query on each padded level.
            memory: encoder output (N, S, C).
            pyramid: where the tokens of the memory lie.

        Returns:
            (N, Q, C).
        """
        y = self.norm2(x + self._self_attention(x, query_pos, None))
        attended = self.cross_attn(y + query_pos, references, memory, pyramid.shapes, pyramid.mask)
        c = self.norm1(y + self.dropout(attended))
        return self.residual.finish_post_norm(x, c + self._feed_forward(c), self.norm3)
