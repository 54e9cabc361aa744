"""Builders for Detectron2's Swin and ViT backbones, which have none for the config.

Both are used as a plain backbone of one feature map; Detectron2 takes parts of them from timm.
Weights: ``MODEL.WEIGHTS`` with
``?matching_heuristics=True`` behind the file name, as in Detectron2.
"""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SwinTransformer, ViT

from .timm import require_timm


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Detectron2's Swin Transformer from the keys ``MODEL.SWIN.*``, up to the stage that is used.

    Its outputs are called ``p0`` to ``p3`` (strides 4 to 32); ``MODEL.DETR.IN_FEATURES`` chooses
    one. ``MODEL.BACKBONE.FREEZE_AT`` 1 freezes the patch embedding, 2 the first stage as well, and
    so on.

    Raises:
        ImportError: timm is not installed.
        ValueError: for a stage that it does not have.
    """
    require_timm("build_swin_backbone")
    swin = cfg.MODEL.SWIN
    names = [f"p{i}" for i in range(len(swin.DEPTHS))]
    chosen = list(cfg.MODEL.DETR.IN_FEATURES) or names[-1:]
    if len(swin.NUM_HEADS) != len(names):
        raise ValueError(
            f"MODEL.SWIN.NUM_HEADS has {len(swin.NUM_HEADS)} values and DEPTHS {len(names)}"
        )
    if len(chosen) != 1 or chosen[0] not in names:
        raise ValueError(f"MODEL.DETR.IN_FEATURES is {chosen}; with Swin use one of {names}")
    last = names.index(chosen[0])
    return SwinTransformer(
        in_chans=input_shape.channels,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS[: last + 1],
        num_heads=swin.NUM_HEADS[: last + 1],
        window_size=swin.WINDOW_SIZE,
        drop_path_rate=swin.DROP_PATH_RATE,
        out_indices=(last,),
        frozen_stages=cfg.MODEL.BACKBONE.FREEZE_AT or -1,  # there 0 is the patch embedding
    )


class SquareViT(ViT):
    """Detectron2's ViT, which tells that it takes square batches of its own size.

    Attributes:
        square_size: pixels.
    """

    square_size: int

    @property
    def padding_constraints(self) -> dict[str, int]:
        """For :meth:`detectron2.structures.ImageList.from_tensors`."""
        return {"square_size": self.square_size}


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SquareViT:
    """Detectron2's ViT from the keys ``MODEL.VIT.*``: one output of stride ``PATCH_SIZE``.

    Every batch is padded to a square of ``MODEL.VIT.IMG_SIZE`` pixels, as in ViTDet.
    ``MODEL.BACKBONE.FREEZE_AT`` 1 freezes patch and position embedding, 2 the first block as well,
    and so on.

    Raises:
        ImportError: timm is not installed.
        ValueError: if the image is no multiple of the patch.
    """
    require_timm("build_vit_backbone")
    vit = cfg.MODEL.VIT
    if vit.IMG_SIZE % vit.PATCH_SIZE:
        raise ValueError(
            f"MODEL.VIT.IMG_SIZE is {vit.IMG_SIZE}, no multiple of PATCH_SIZE {vit.PATCH_SIZE}"
        )
    body = SquareViT(
        img_size=vit.IMG_SIZE,
        patch_size=vit.PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=vit.EMBED_DIM,
        depth=vit.DEPTH,
        num_heads=vit.NUM_HEADS,
        drop_path_rate=vit.DROP_PATH_RATE,
        window_size=vit.WINDOW_SIZE,
        window_block_indexes=[i for i in range(vit.DEPTH) if i not in vit.GLOBAL_BLOCKS],
        use_rel_pos=vit.USE_REL_POS,
    )
    body.square_size = vit.IMG_SIZE
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0:
        body.patch_embed.requires_grad_(False)
        body.pos_embed.requires_grad_(False)
    for block in body.blocks[: max(freeze_at - 1, 0)]:
        block.requires_grad_(False)
    return body
