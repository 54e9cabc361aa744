"""Ours to a Hugging Face model: state dict and config."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .convert import PRE_NORM_KEY, StateDict, reverse_huggingface
from .errors import CheckpointError

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
) -> tuple[StateDict, dict[str, Any]]:
    """Convert a DETR of ours to ``transformers.DetrForObjectDetection``, with a timm backbone.

    The keys are those of the published files, which every release of ``transformers`` reads.

    Args:
        state_dict: of a post-norm ``MitiDetr`` without layer residual (which the keys do not
            tell), with a ResNet.
        nhead: attention heads, which the weights do not tell.
        dilation: whether res5 is dilated (DC5), which the weights do not tell either.
        class_names: of the K classes, for ``id2label``; None: ``LABEL_0`` and so on.

    Returns:
        The state dict, for ``model.safetensors``, and the content of ``config.json``.

    Raises:
        CheckpointError: for pre-norm weights and for backbones that are no standard ResNet.
        ValueError: if there are not K class names.
    """
    if PRE_NORM_KEY in state_dict:
        raise CheckpointError("Hugging Face's DETR is post-norm; these weights are pre-norm")
    backbone = _resnet_name(state_dict)
    num_classes = len(state_dict["class_embed.bias"]) - 1
    names = list(class_names or (f"LABEL_{i}" for i in range(num_classes)))
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} class names for {num_classes} classes")
    num_queries, d_model = state_dict["query_embed.weight"].shape
    config: dict[str, Any] = {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "use_timm_backbone": True,
        "backbone": backbone,
        "backbone_config": None,
        "use_pretrained_backbone": False,
        "dilation": dilation,
        "d_model": d_model,
        "num_queries": num_queries,
        "position_embedding_type": "learned"
        if "position_encoding.row_embed.weight" in state_dict
        else "sine",
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    for stack in ("encoder", "decoder"):
        prefix = f"transformer.{stack}.layers."
        config[f"{stack}_layers"] = _count(state_dict, prefix)
        config[f"{stack}_attention_heads"] = nhead
        if config[f"{stack}_layers"]:
            config[f"{stack}_ffn_dim"] = len(state_dict[f"{prefix}0.linear1.bias"])
    return reverse_huggingface(state_dict), config


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
