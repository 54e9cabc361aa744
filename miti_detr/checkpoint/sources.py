"""The formats of state dicts: what each is called, recognised by, and its table."""

from typing import NamedTuple

from miti_detr.packages import EFFICIENTNET_LITE0

from .deformable import DEFORMABLE, HF_DEFORMABLE
from .tables import (
    BODY,
    D2_WRAPPER,
    DETECTRON2_RESNET,
    DETR,
    HF,
    HF_MASK_HEAD,
    MASK_HEAD,
    TORCHVISION_RESNET,
    UP_DETR_PRETRAIN,
    Row,
    under,
)


class Source(NamedTuple):
    """A format of state dicts.

    Attributes:
        label: for messages.
        signature: a key that starts so is in every state dict of this format and of no other one.
        rows: the table.
    """

    label: str
    signature: str
    rows: tuple[Row, ...]


# In the order of trial: a special one comes before the general one that it resembles.
SOURCES: dict[str, Source] = {
    # Keys pass as they are: any backbone and transformer may follow our prefixes.
    "ours": Source("miti_detr", "backbone.body.", (Row("{rest}", "{rest}"),)),
    "deformable_detr": Source("official Deformable-DETR", "transformer.level_embed", DEFORMABLE),
    "hf_deformable": Source("Hugging Face Deformable-DETR", "model.level_embed", HF_DEFORMABLE),
    "up_detr_pretrain": Source("UP-DETR pre-training", "patch2query.", UP_DETR_PRETRAIN),
    "detr": Source("official DETR", "backbone.0.body.", DETR),
    "detr_panoptic": Source(
        "official DETR with a mask head",
        "detr.backbone.0.body.",
        (*under("detr.", DETR), *MASK_HEAD),
    ),
    "d2_wrapper": Source("Detectron2 wrapper of DETR", "detr.backbone.0.backbone.", D2_WRAPPER),
    "d2_wrapper_panoptic": Source(
        "Detectron2 wrapper of DETR with a mask head",
        "detr.detr.backbone.0.backbone.",
        (*under("detr.", (*D2_WRAPPER[:-1], *MASK_HEAD)), D2_WRAPPER[-1]),
    ),
    "hf": Source("Hugging Face DETR", "model.query_position_embeddings.", HF),
    "hf_panoptic": Source(
        "Hugging Face DETR with a mask head",
        "detr.model.query_position_embeddings.",
        (*under("detr.", HF), *HF_MASK_HEAD),
    ),
    "torchvision_resnet": Source(
        "torchvision ResNet",
        "layer1.0.conv1.",
        # SwAV's has a projection and prototypes in place of the classifier.
        (
            *under("", TORCHVISION_RESNET, BODY),
            *(Row(f"{head}.{{rest}}", None) for head in ("fc", "projection_head", "prototypes")),
        ),
    ),
    "detectron2_resnet": Source(
        "Detectron2 ResNet",
        "res2.0.conv1.",
        (*under("", DETECTRON2_RESNET, BODY), Row("stem.fc.{p}", None)),
    ),
    "efficientnet_lite0": Source(
        "EfficientNet-Lite0",
        "_conv_stem.",
        under("", tuple(Row(*keys) for keys in EFFICIENTNET_LITE0.items()), BODY + "net."),
    ),
}
BACKBONE_SOURCES = ("torchvision_resnet", "detectron2_resnet", "efficientnet_lite0")
FOCAL_SOURCES = ("deformable_detr", "hf_deformable")  # their class heads have no "no object"

# A model that has this key pre-trains. Other models take over all but these of its weights: the
# class head, too, which tells "a patch of this image" from "nothing".
PRETRAINING_KEY = "patch2query.weight"
PRETRAINING_ONLY = ("patch2query.", "feature_align.", "class_embed.")

# A model that has this key has masks. Other models take over all but these of its weights.
MASK_KEY = "mask_head.out_lay.weight"
MASK_ONLY = ("bbox_attention.", "mask_head.")
