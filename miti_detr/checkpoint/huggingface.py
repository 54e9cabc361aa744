"""Ours to a Hugging Face model: state dict and config."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .class_head import keys_in
from .convert import PRE_NORM_KEY, StateDict, reverse_huggingface
from .deformable import KEY as DEFORMABLE_KEY
from .errors import CheckpointError
from .sources import MASK_KEY

# (blocks have a third convolution, blocks of res2 to res5) -> name of the network in timm
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def to_hf(
    state_dict: Mapping[str, Tensor],
    *,
    nhead: int = 8,
    dilation: bool = False,
    class_names: Sequence[str] | None = None,
    num_queries: int = 300,
) -> tuple[StateDict, dict[str, Any]]:
    """Convert a model of ours to ``transformers``, with a timm backbone.

    A DETR becomes a ``DetrForObjectDetection``, with a mask head a ``DetrForSegmentation``, a
    Deformable-DETR a ``DeformableDetrForObjectDetection``. The keys are those of the published
    files, which every release of ``transformers`` reads.

    Args:
        state_dict: of a post-norm ``MitiDetr`` or ``DeformableDetr`` without layer residual
            (which the keys do not tell), with a ResNet.
        nhead: attention heads, which the weights do not tell.
        dilation: whether res5 is dilated (DC5), which the weights do not tell either.
        class_names: of the K classes, for ``id2label``; None: ``LABEL_0`` and so on.
        num_queries: of a two-stage Deformable-DETR, whose weights do not tell it.

    Returns:
        The state dict, for ``model.safetensors``, and the content of ``config.json``.

    Raises:
        CheckpointError: for pre-norm weights and for backbones that are no standard ResNet.
        ValueError: if there are not K class names.
    """
    if PRE_NORM_KEY in state_dict:
        raise CheckpointError("Hugging Face's DETR is post-norm; these weights are pre-norm")
    backbone = _resnet_name(state_dict)
    deformable = DEFORMABLE_KEY in state_dict
    num_classes = len(state_dict[keys_in(state_dict)[0]]) - (not deformable)
    names = list(class_names or (f"LABEL_{i}" for i in range(num_classes)))
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} class names for {num_classes} classes")
    config = {
        "backbone": backbone,
        "dilation": dilation,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        **_detr_config(state_dict, nhead),
    }
    if deformable:
        config |= _deformable_config(state_dict, nhead, num_queries)
    return reverse_huggingface(state_dict), config


def _detr_config(state_dict: Mapping[str, Tensor], nhead: int) -> dict[str, Any]:
    """The sizes of the transformer."""
    masks = MASK_KEY in state_dict
    if masks and "mask_head.adapter3.weight" not in state_dict:
        raise CheckpointError("Hugging Face's mask head needs res2, res3 and res4 beside res5")
    config: dict[str, Any] = {
        "architectures": ["DetrForSegmentation" if masks else "DetrForObjectDetection"],
        "model_type": "detr",
        "use_timm_backbone": True,
        "backbone_config": None,
        "use_pretrained_backbone": False,
        "d_model": len(state_dict["transformer.decoder.layers.0.linear2.bias"]),
        "position_embedding_type": "learned"
        if "position_encoding.row_embed.weight" in state_dict
        else "sine",
    }
    for stack in ("encoder", "decoder"):
        prefix = f"transformer.{stack}.layers."
        config[f"{stack}_layers"] = _count(state_dict, prefix)
        config[f"{stack}_attention_heads"] = nhead
        if config[f"{stack}_layers"]:
            config[f"{stack}_ffn_dim"] = len(state_dict[f"{prefix}0.linear1.bias"])
    if "query_embed.weight" in state_dict:
        config["num_queries"] = len(state_dict["query_embed.weight"])
    return config


def _deformable_config(
    state_dict: Mapping[str, Tensor], nhead: int, num_queries: int
) -> dict[str, Any]:
    """What a Deformable-DETR has in addition, or under another value.

    Raises:
        CheckpointError: for levels that Hugging Face's model cannot have.
    """
    last = state_dict["backbone.body.res5.0.shortcut.weight"].shape[0]
    features = [
        weight.shape[1]
        for key, weight in state_dict.items()
        if re.fullmatch(r"input_proj\.\d+\.0\.weight", key) and weight.shape[2:] == (1, 1)
    ]
    if features not in ([last], [last // 4, last // 2, last]):
        raise CheckpointError(
            "Hugging Face's Deformable-DETR takes res3, res4 and res5 or only res5; the features "
            f"of these weights have {features} channels"
        )
    levels = len(state_dict[DEFORMABLE_KEY])
    offsets = len(state_dict["transformer.decoder.layers.0.cross_attn.sampling_offsets.bias"])
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "num_feature_levels": levels,
        "encoder_n_points": offsets // (2 * levels * nhead),
        "decoder_n_points": offsets // (2 * levels * nhead),
        "with_box_refine": "bbox_embed.1.layers.0.weight" in state_dict,
        "two_stage": "transformer.enc_output.weight" in state_dict,
        "two_stage_num_proposals": num_queries,
    }


def _resnet_name(state_dict: Mapping[str, Tensor]) -> str:
    third = "backbone.body.res2.0.conv3.weight" in state_dict
    widths = tuple(
        len(state_dict.get(f"backbone.body.{name}.weight", ()))
        for name in ("stem.conv1", "res5.0.shortcut")
    )
    blocks = tuple(_count(state_dict, f"backbone.body.res{stage}.") for stage in (2, 3, 4, 5))
    if (third, blocks) not in _RESNETS or widths != (64, 2048 if third else 512):
        raise CheckpointError(
            "Hugging Face's DETR needs a ResNet of 18 to 152 layers in its usual width; the blocks "
            f"of these weights are {blocks}, with {widths[0]} channels first and {widths[1]} last"
        )
    return _RESNETS[third, blocks]


def _count(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    """Count the numbers that follow a prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    return len({match[1] for key in state_dict if (match := pattern.match(key))})
