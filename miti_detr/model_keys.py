"""Rules of the config keys that the model reads."""

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from miti_detr.checks import Choice, Each, Real, Rule, Text, Whole, check_keys, shown
from miti_detr.layers import PADDING_MASK_RULES
from miti_detr.modeling.transformer.residual import LAYER_RESIDUAL_STACKS, LAYER_RESIDUALS

_WEIGHT = Real(0, 3e38)  # of a loss

_RULES: dict[str, Rule] = {
    "MODEL.DETR.LAYER_RESIDUAL": Choice(LAYER_RESIDUALS),
    "MODEL.DETR.LAYER_RESIDUAL_IN": Choice(LAYER_RESIDUAL_STACKS),
    "MODEL.DETR.WEIGHTS_RESIDUAL": Choice(("", *LAYER_RESIDUALS)),
    "MODEL.DETR.RESIDUAL_RAMP_ITERS": Whole(0),
    "MODEL.DETR.HIDDEN_DIM": Whole(2, 8192),
    "MODEL.DETR.NHEADS": Whole(1, 1024),
    "MODEL.DETR.ENC_LAYERS": Whole(0, 256),
    "MODEL.DETR.DEC_LAYERS": Whole(1, 256),
    "MODEL.DETR.DIM_FEEDFORWARD": Whole(1, 65536),
    "MODEL.DETR.DROPOUT": Real(0, 1, below=True),
    "MODEL.DETR.NUM_CLASSES": Whole(1, 100_000),
    "MODEL.DETR.NUM_OBJECT_QUERIES": Whole(1, 100_000),
    "MODEL.DETR.IN_FEATURES": Each(Text(), longest=16),
    "MODEL.DETR.POSITION_EMBEDDING": Choice(("sine", "learned")),
    "MODEL.DETR.PADDING_MASK": Choice(PADDING_MASK_RULES),
    "MODEL.DETR.SIZE_DIVISIBILITY": Whole(0, 4096),
    "MODEL.DETR.ACTIVATION_CHECKPOINT": Choice((False, True)),
    "MODEL.DETR.ACTIVATION_CHECKPOINT_IN": Each(Text(), shortest=1, longest=100),
    "MODEL.DETR.CLASS_LOSS": Choice(("softmax", "focal")),
    "MODEL.DETR.FOCAL_ALPHA": Real(0, 1),
    "MODEL.DETR.FOCAL_GAMMA": Real(0, 100),
    "TEST.DETECTIONS_PER_IMAGE": Whole(1, 100_000),
    "MODEL.DETR.NUM_FEATURE_LEVELS": Whole(1, 8),
    "MODEL.DETR.NUM_POINTS": Whole(1, 64),
    "MODEL.DETR.CLASS_WEIGHT": _WEIGHT,
    "MODEL.DETR.L1_WEIGHT": _WEIGHT,
    "MODEL.DETR.GIOU_WEIGHT": _WEIGHT,
    "MODEL.DETR.NO_OBJECT_WEIGHT": _WEIGHT,
    "MODEL.MASK_ON": Choice((False, True)),
    "MODEL.DETR.MASK_POINTS": Whole(0, 10**7),
    "MODEL.DETR.STUFF_CLASSES": Each(Whole(0, 99_999), longest=100_000, increasing=True),
    "TEST.PANOPTIC_THRESHOLD": Real(0, 1),
    "TEST.MASK_MIN_SCORE": Real(0, 1),
    "TEST.MASK_FORMAT": Choice(("bool", "rle")),
    "MODEL.UP_DETR.FEATURE_WEIGHT": _WEIGHT,
    "INPUT.PATCHES.NUMBER": Whole(0, 10_000),
    "INPUT.PATCHES.SIZE": Whole(1, 4096),
    "MODEL.PIXEL_MEAN": Each(Real(-1e6, 1e6), shortest=1, longest=64),
    "MODEL.PIXEL_STD": Each(Real(0, 1e6, above=True), shortest=1, longest=64),
    "MODEL.BACKBONE.FREEZE_AT": Whole(-1, 1000),
    "MODEL.BACKBONE.CACHE_FEATURES": Whole(0, 1000),
    "SOLVER.BACKBONE_MULTIPLIER": Real(0, 1e6),
    "MODEL.TF32": Choice(("default", "on", "off")),
    "SOLVER.AMP.PRECISION": Choice(("float16", "bfloat16")),
}

_CHANNELS = Whole(1, 65536)
_RESNET: dict[str, Rule] = {
    "MODEL.RESNETS.DEPTH": Choice((18, 34, 50, 101, 152)),
    "MODEL.RESNETS.NUM_GROUPS": Whole(1, 1024),
    "MODEL.RESNETS.WIDTH_PER_GROUP": Whole(1, 8192),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": Whole(1, 8192),
    "MODEL.RESNETS.RES5_DILATION": Choice((1, 2)),
}
_OF_BACKBONE: dict[str, dict[str, Rule]] = {
    "build_resnet_backbone": _RESNET,
    "build_detr_resnet_backbone": _RESNET,
    "build_resnet_fpn_backbone": {**_RESNET, "MODEL.FPN.OUT_CHANNELS": _CHANNELS},
    "build_swin_backbone": {
        "MODEL.SWIN.EMBED_DIM": Whole(32, 4096, divisor=32),  # the width of an attention head
        "MODEL.SWIN.DEPTHS": Each(Whole(1, 256), shortest=1, longest=8),
    },
    "build_vit_backbone": {
        "MODEL.VIT.IMG_SIZE": Whole(16, 8192, divisor=16),  # the side of a patch
        "MODEL.VIT.EMBED_DIM": Whole(64, 16384, divisor=64),  # the width of an attention head
    },
    "build_timm_backbone": {"MODEL.TIMM.NAME": Text()},
}


def check_model_keys(cfg: CfgNode) -> None:
    """Check the keys that the model reads, those of the chosen backbone included.

    Args:
        cfg: with the keys of this package.

    Raises:
        ValueError: names key, value and remedy.
    """
    for key, registry in (
        ("META_ARCHITECTURE", META_ARCH_REGISTRY),
        ("BACKBONE.NAME", BACKBONE_REGISTRY),
    ):
        known = Choice(sorted(name for name, _ in registry))
        check_keys(cfg, {f"MODEL.{key}": known})
    check_keys(cfg, _RULES)
    check_keys(cfg, _OF_BACKBONE.get(cfg.MODEL.BACKBONE.NAME, {}))
    detr = cfg.MODEL.DETR
    if detr.HIDDEN_DIM % detr.NHEADS:
        raise ValueError(
            f"MODEL.DETR.HIDDEN_DIM {detr.HIDDEN_DIM} is not divisible by MODEL.DETR.NHEADS "
            f"{detr.NHEADS}. Change one of them."
        )
    even = 4 if detr.POSITION_EMBEDDING == "sine" else 2  # two axes; sine and cosine of each
    if detr.HIDDEN_DIM % even:
        raise ValueError(
            f"MODEL.DETR.HIDDEN_DIM is {detr.HIDDEN_DIM}; with MODEL.DETR.POSITION_EMBEDDING "
            f"{detr.POSITION_EMBEDDING} it must be a multiple of {even}"
        )
    if detr.STUFF_CLASSES and detr.STUFF_CLASSES[-1] >= detr.NUM_CLASSES:
        raise ValueError(
            f"MODEL.DETR.STUFF_CLASSES ends with {detr.STUFF_CLASSES[-1]}; it must be below "
            f"MODEL.DETR.NUM_CLASSES, which is {detr.NUM_CLASSES}"
        )
    parts = tuple(detr.ACTIVATION_CHECKPOINT_IN)
    if parts != ("backbone", "transformer") and not detr.ACTIVATION_CHECKPOINT:
        raise ValueError(
            f"MODEL.DETR.ACTIVATION_CHECKPOINT_IN is {parts}, which has no effect. Set "
            "MODEL.DETR.ACTIVATION_CHECKPOINT True as well"
        )
    _check_shallow_resnet(cfg)
    _check_lite0(cfg)
    _check_deformable(cfg)
    if not (detr.CLASS_WEIGHT or detr.L1_WEIGHT or detr.GIOU_WEIGHT):
        raise ValueError(
            "MODEL.DETR.CLASS_WEIGHT, L1_WEIGHT and GIOU_WEIGHT are all 0. Give one a weight."
        )
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        raise ValueError(
            f"MODEL.PIXEL_MEAN has {len(cfg.MODEL.PIXEL_MEAN)} values and MODEL.PIXEL_STD "
            f"{len(cfg.MODEL.PIXEL_STD)}. Give one of each per channel."
        )


def _check_deformable(cfg: CfgNode) -> None:
    """Keys that only Deformable-DETR has, and those of DETR that it does not have."""
    detr = cfg.MODEL.DETR
    wrong: dict[str, tuple[bool, str]]
    if cfg.MODEL.META_ARCHITECTURE == "DeformableDetr":
        if cfg.MODEL.CUDA_GRAPHS:
            raise ValueError("MODEL.CUDA_GRAPHS is True; DeformableDetr has none: set it to False")
        wrong = {
            "PRE_NORM": (detr.PRE_NORM, "DeformableDetr is post-norm: set it to False"),
            "LAYER_RESIDUAL": (
                detr.LAYER_RESIDUAL == "after_norm",
                "the layers of DeformableDetr feed sampling offsets and heads without a norm in "
                "between, which would grow with depth: use none or before_norm",
            ),
            "HIDDEN_DIM": (
                detr.HIDDEN_DIM % 32 > 0,
                "DeformableDetr normalises 32 groups of channels: use a multiple of 32",
            ),
            "NUM_FEATURE_LEVELS": (
                len(detr.IN_FEATURES) > detr.NUM_FEATURE_LEVELS,
                f"each of MODEL.DETR.IN_FEATURES {list(detr.IN_FEATURES)} is a level",
            ),
            "TWO_STAGE": (
                detr.TWO_STAGE and not detr.BOX_REFINEMENT,
                "set MODEL.DETR.BOX_REFINEMENT True as well",
            ),
        }
    else:
        remedy = "set MODEL.META_ARCHITECTURE DeformableDetr as well"
        wrong = {
            "NUM_FEATURE_LEVELS": (detr.NUM_FEATURE_LEVELS > 1, remedy),
            "BOX_REFINEMENT": (detr.BOX_REFINEMENT, remedy),
            "TWO_STAGE": (detr.TWO_STAGE, remedy),
        }
    for key, (is_wrong, remedy) in wrong.items():
        if is_wrong:
            raise ValueError(f"MODEL.DETR.{key} is {shown(detr[key])}; {remedy}")


def _check_shallow_resnet(cfg: CfgNode) -> None:
    """ResNet-18 and 34 of Detectron2 have basic blocks, which exist in one form only."""
    resnet = cfg.MODEL.RESNETS
    of_detectron2 = ("build_resnet_backbone", "build_resnet_fpn_backbone")
    if cfg.MODEL.BACKBONE.NAME not in of_detectron2 or resnet.DEPTH not in (18, 34):
        return
    for key, only in (("RES2_OUT_CHANNELS", 64), ("RES5_DILATION", 1), ("NUM_GROUPS", 1)):
        if resnet[key] != only:
            raise ValueError(
                f"MODEL.RESNETS.{key} is {resnet[key]}; with MODEL.RESNETS.DEPTH {resnet.DEPTH} it "
                f"must be {only}"
            )


def _check_lite0(cfg: CfgNode) -> None:
    """The efficientnet_lite0 of timm has the same tensors, but pads images in another way."""
    weights, name, network = cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.NAME, "tf_efficientnet_lite0"
    if weights != "package://efficientnet_lite0" or name == network:
        return
    if cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        raise ValueError(
            f"MODEL.WEIGHTS {weights} are those of {network}, and MODEL.TIMM.NAME is {name}. Set "
            f"MODEL.TIMM.NAME {network}"
        )
