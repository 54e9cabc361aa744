"""The transformer of Deformable-DETR.

N images, S tokens of all levels, Q object queries, L decoder layers, C width, K classes.
State-dict keys are those of fundamentalvision/Deformable-DETR ``models/deformable_transformer.py``
at 11169a6, without the heads that it repeats below the decoder.
"""

from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from miti_detr.layers import DeformableAttention, at_least_float32
from miti_detr.modeling.stages import SetPrediction
from miti_detr.modeling.transformer.residual import placements
from miti_detr.modeling.transformer.stack import LayerStack

from .boxes import embed_boxes, refine_boxes, token_boxes
from .layers import DeformableDecoderLayer, DeformableEncoderLayer, LayerSizes
from .pyramid import Pyramid


class DeformableStates(NamedTuple):
    """What the transformer returns.

    Attributes:
        states: decoder states (L, N, Q, C); no norm follows the layers.
        boxes: (L, N, Q, 4) ``cxcywh`` in [0, 1] of the un-padded image.
        memory: encoder output (N, S, C).
        proposals: of the encoder in a two-stage model, logits (1, N, S, K) and boxes (1, N, S, 4).
    """

    states: Tensor
    boxes: Tensor
    memory: Tensor
    proposals: SetPrediction | None


class DeformableTransformer(nn.Module):
    """Encoder and decoder with deformable attention, and the layer residual as a switch.

    ``layer_residual="none"`` is the published model. ``before_norm`` adds the input of a layer to
    its last sum, before its last norm, as in Miti-DETR. The queries start from learned states, so
    that, unlike in DETR, the residual of the first decoder layer has something to carry.
    """

    @configurable
    def __init__(
        self,
        *,
        sizes: LayerSizes,
        num_encoder_layers: int,
        num_decoder_layers: int,
        num_queries: int,
        box_refinement: bool = False,
        two_stage: bool = False,
        layer_residual: str,
        layer_residual_in: str = "both",
    ) -> None:
        """Make the stacks.

        Args:
            sizes: of the layers.
            num_encoder_layers: 0 is allowed: the memory is then the source itself.
            num_decoder_layers: L, at least 1.
            num_queries: Q.
            box_refinement: the boxes of a decoder layer are the references of the next one.
            two_stage: queries and references come from the encoder's best proposals; needs
                ``box_refinement``.
            layer_residual: ``none`` or ``before_norm``.
            layer_residual_in: ``both``, ``encoder`` or ``decoder``: the stacks that have it.

        Raises:
            ValueError: for values outside these.
        """
        super().__init__()
        if layer_residual == "after_norm" or (two_stage and not box_refinement):
            raise ValueError("after_norm, and two_stage without box_refinement, are not supported")
        in_encoder, in_decoder = placements(layer_residual, layer_residual_in)
        encoder_layer = DeformableEncoderLayer(sizes, layer_residual=in_encoder)
        decoder_layer = DeformableDecoderLayer(sizes, layer_residual=in_decoder)
        self.d_model = d_model = sizes.d_model
        self.nhead = sizes.nhead
        self.num_levels = sizes.num_levels
        self.num_queries = num_queries
        self.box_refinement = box_refinement
        self.two_stage = two_stage
        self.pre_norm = False
        self.layer_residual = layer_residual
        self.layer_residual_in = layer_residual_in
        self.level_embed = nn.Parameter(torch.empty(sizes.num_levels, d_model))
        self.encoder = LayerStack(encoder_layer, num_encoder_layers)
        self.decoder = LayerStack(decoder_layer, num_decoder_layers)
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        else:
            self.reference_points = nn.Linear(d_model, 2)
        self._reset_parameters()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        """Read ``cfg.MODEL.DETR``."""
        detr = cfg.MODEL.DETR
        return {
            "sizes": LayerSizes(
                d_model=detr.HIDDEN_DIM,
                nhead=detr.NHEADS,
                num_levels=detr.NUM_FEATURE_LEVELS,
                num_points=detr.NUM_POINTS,
                dim_feedforward=detr.DIM_FEEDFORWARD,
                dropout=detr.DROPOUT,
            ),
            "num_encoder_layers": detr.ENC_LAYERS,
            "num_decoder_layers": detr.DEC_LAYERS,
            "num_queries": detr.NUM_OBJECT_QUERIES,
            "box_refinement": detr.BOX_REFINEMENT,
            "two_stage": detr.TWO_STAGE,
            "layer_residual": detr.LAYER_RESIDUAL,
            "layer_residual_in": detr.LAYER_RESIDUAL_IN,
        }

    def forward(
        self,
        tokens: Tensor,
        pos: Tensor,
        pyramid: Pyramid,
        query_embed: Tensor | None,
        class_embed: nn.ModuleList,
        bbox_embed: nn.ModuleList,
    ) -> DeformableStates:
        """Encode the tokens and decode the queries.

        Args:
            tokens: projected features (N, S, C).
            pos: position encoding (N, S, C), without that of the level.
            pyramid: where the tokens lie.
            query_embed: (Q, 2 C), position and initial state; not used in a two-stage model.
            class_embed: class heads: one, or one of each decoder layer; in a two-stage model one
                more, of the proposals.
            bbox_embed: box heads, likewise.
        """
        memory, pos = tokens, pos + pyramid.per_level(self.level_embed)
        centres = pyramid.on_levels(pyramid.cell_centres())
        for layer in self.encoder.layers:
            memory = layer(memory, pos, centres, pyramid)
        proposals = None
        if self.two_stage:
            proposals = self._propose(memory, pyramid, class_embed[-1], bbox_embed[-1])
            query_pos, x, references = self._best_proposals(proposals)
        else:
            assert query_embed is not None
            query_pos, x = query_embed.expand(tokens.shape[0], -1, -1).chunk(2, dim=-1)
            references = self.reference_points(query_pos).sigmoid()
        states, boxes = [], []
        for index, layer in enumerate(self.decoder.layers):
            x = layer(x, query_pos, pyramid.on_levels(references), memory, pyramid)
            states.append(x)
            boxes.append(refine_boxes(x, references, head_of(bbox_embed, index)))
            if self.box_refinement:
                references = boxes[-1].detach()
        return DeformableStates(torch.stack(states), torch.stack(boxes), memory, proposals)

    def _propose(
        self, memory: Tensor, pyramid: Pyramid, class_embed: nn.Module, bbox_embed: nn.Module
    ) -> SetPrediction:
        """A box and class logits of every token."""
        anchors, valid = token_boxes(pyramid)
        states = memory.masked_fill(~valid[..., None], 0)
        states = self.enc_output_norm(self.enc_output(states))
        boxes = (at_least_float32(bbox_embed(states)) + anchors).sigmoid()
        return SetPrediction(class_embed(states)[None], boxes[None])

    def _best_proposals(self, proposals: SetPrediction) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from the Q proposals with the highest first logit, that of "object".

        Returns:
            Query positions (N, Q, C), initial states (N, Q, C), and references (N, Q, 4).
        """
        scores, boxes = proposals.logits[0, ..., 0], proposals.boxes[0]
        best = scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices
        references = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        embedded = embed_boxes(references, self.d_model).to(self.pos_trans.weight.dtype)
        query_pos, x = self.pos_trans_norm(self.pos_trans(embedded)).chunk(2, dim=-1)
        return query_pos, x, references

    def _reset_parameters(self) -> None:
        """Xavier-uniform for every matrix but those of deformable attention, as published."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)


def head_of(heads: nn.ModuleList, layer: int) -> nn.Module:
    """The head of a decoder layer: its own, or the only one."""
    return heads[layer if len(heads) > 1 else 0]
