"""Builders for Detectron2's Swin and ViT backbones, which have none for the config.

Both are used as a plain backbone of one feature map; Detectron2 takes parts of them from timm.
Weights: ``MODEL.WEIGHTS`` with ``?matching_heuristics=True`` behind the file name.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer, ViT

from .timm import require_timm

_VIT_DEPTHS = {1024: 24, 1280: 32}  # of ViT-L and ViT-H; 12 blocks at other widths


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Detectron2's Swin Transformer from the keys ``MODEL.SWIN.*``, up to the stage that is used.

    Heads are 32 wide and windows have 7 x 7 tokens, as in all published sizes. Its outputs are
    called ``p0`` to ``p3`` (strides 4 to 32); ``MODEL.DETR.IN_FEATURES`` chooses one.
    ``MODEL.BACKBONE.FREEZE_AT`` 1 freezes the patch embedding, 2 the first stage as well, ...

    Raises:
        ImportError: timm is not installed.
        ValueError: for a stage that it does not have.
    """
    require_timm("build_swin_backbone")
    swin = cfg.MODEL.SWIN
    names = [f"p{i}" for i in range(len(swin.DEPTHS))]
    chosen = list(cfg.MODEL.DETR.IN_FEATURES) or names[-1:]
    if len(chosen) != 1 or chosen[0] not in names:
        raise ValueError(f"MODEL.DETR.IN_FEATURES is {chosen}; with Swin use one of {names}")
    last = names.index(chosen[0])
    return SwinTransformer(
        in_chans=input_shape.channels,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS[: last + 1],
        num_heads=[swin.EMBED_DIM // 32 * 2**i for i in range(last + 1)],
        window_size=7,
        drop_path_rate=0.2,  # of the last block, as in Swin-T; less before it
        out_indices=(last,),
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT or -1,  # there 0 is the patch embedding
    )


class SquareViT(ViT):
    """Detectron2's ViT for square batches of ``square_size`` pixels."""

    square_size: int

    @property
    def padding_constraints(self) -> dict[str, int]:
        """For :meth:`detectron2.structures.ImageList.from_tensors`."""
        return {"square_size": self.square_size}


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SquareViT:
    """Detectron2's ViT from the keys ``MODEL.VIT.*``: one output of stride 16, as in ViTDet.

    Heads are 64 wide, windows have 14 x 14 tokens, and four blocks, evenly spread, attend to the
    whole image; positions are relative.

    Every batch is padded to a square of ``MODEL.VIT.IMG_SIZE`` pixels, as in ViTDet.
    ``MODEL.BACKBONE.FREEZE_AT`` 1 freezes patch and position embedding, 2 the first block as well,
    and so on.

    Raises:
        ImportError: timm is not installed.
    """
    require_timm("build_vit_backbone")
    vit = cfg.MODEL.VIT
    depth = _VIT_DEPTHS.get(vit.EMBED_DIM, 12)
    whole_image = {round(depth * (i + 1) / 4) - 1 for i in range(4)}
    body = SquareViT(
        img_size=vit.IMG_SIZE,
        patch_size=16,
        in_chans=input_shape.channels,
        embed_dim=vit.EMBED_DIM,
        depth=depth,
        num_heads=vit.EMBED_DIM // 64,
        drop_path_rate=0.1,  # of the last block, as in ViT-B; less before it
        window_size=14,
        window_block_indexes=[i for i in range(depth) if i not in whole_image],
        use_rel_pos=True,
    )
    body.square_size = vit.IMG_SIZE
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0:
        body.patch_embed.requires_grad_(False)
        body.pos_embed.requires_grad_(False)
    for block in body.blocks[: max(freeze_at - 1, 0)]:
        block.requires_grad_(False)
    return body
