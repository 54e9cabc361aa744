"""Deformable-DETR: tables of its keys, and the heads that other implementations hold twice.

The published model has a class and a box head for each decoder layer. Without box refinement they
are one and the same. With it, the decoder holds the box heads once more; in a two-stage model also
the class heads. Ours has each of them once.

Sources: fundamentalvision/Deformable-DETR at 11169a6, huggingface/transformers
``models/deformable_detr`` (4.x, and the module names of 5.x).
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .errors import CheckpointError
from .tables import (
    BODY,
    FEED_FORWARD,
    HF_BACKBONE,
    LAYERS,
    PACKED,
    POSITIONS,
    TORCHVISION_RESNET,
    Row,
    hf_attention,
    hf_rows,
    same,
    under,
)

KEY = "transformer.level_embed"  # of every Deformable-DETR in our keys
_HEAD = re.compile(r"(?P<kind>class|bbox)_embed\.(?P<index>\d+)\.(?P<rest>.+)")

_SAMPLING = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_MODULES = (  # of the transformer: the published name, which is ours, and Hugging Face's
    ("level_embed", "level_embed"),
    *((f"{name}.{{p}}",) * 2 for name in ("reference_points", "enc_output", "enc_output_norm")),
    *((f"{name}.{{p}}",) * 2 for name in ("pos_trans", "pos_trans_norm")),
    *(
        (f"{stack}.layers.{{i}}.{ours}.{name}.{{p}}", f"{stack}.layers.{{i}}.{theirs}.{name}.{{p}}")
        for stack, ours, theirs in (
            ("encoder", "self_attn", "self_attn"),
            ("decoder", "cross_attn", "encoder_attn"),
        )
        for name in _SAMPLING
    ),
)
_LEVELS = same(*(f"input_proj.{{i}}.{part}.{{p}}" for part in (0, 1)))
_HEADS = same("class_embed.{i}.{p}", *(f"bbox_embed.{{i}}.layers.{n}.{{p}}" for n in range(3)))

DEFORMABLE = (
    *under("backbone.0.body.", TORCHVISION_RESNET, BODY),
    *POSITIONS,
    *_LEVELS,
    *_HEADS,
    *under("transformer.decoder.", _HEADS),
    *same(
        "query_embed.weight",
        *(f"transformer.{ours}" for ours, _ in _MODULES),
        *(f"transformer.decoder.layers.{{i}}.self_attn.{name}" for name in PACKED),
        *LAYERS,
    ),
    # Left in some files by a counter of operations
    *(
        Row(f"{prefix}total_{what}", None)
        for prefix in ("", "{rest}.")
        for what in ("ops", "params")
    ),
)

HF_DEFORMABLE = (
    *HF_BACKBONE,
    *under("model.", _LEVELS),
    *_HEADS,
    *under("model.decoder.", _HEADS),
    Row("model.query_position_embeddings.weight", "query_embed.weight"),
    *(Row(f"model.{theirs}", f"transformer.{ours}") for ours, theirs in _MODULES),
    *hf_rows(
        "encoder",
        {**FEED_FORWARD, "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    ),
    *hf_rows(
        "decoder",
        {
            **FEED_FORWARD,
            "self_attn_layer_norm": "norm2",
            "encoder_attn_layer_norm": "norm1",
            "final_layer_norm": "norm3",
        },
    ),
    *hf_attention("model.decoder.layers.{i}.self_attn", "transformer.decoder.layers.{i}.self_attn"),
)


def merge_heads(state: dict[str, Tensor], *, refined: bool) -> tuple[str, ...]:
    """Leave one of the heads that all decoder layers share.

    Args:
        state: in our keys with the heads of every layer; changed in place.
        refined: the source says that each layer has its own heads.

    Returns:
        The keys that were removed; none if the heads differ.
    """
    copies = [key for key, _, index, _ in _heads(state) if index > 0]
    shared = not refined and all(
        torch.equal(state[key], state[_HEAD.sub(r"\g<kind>_embed.0.\g<rest>", key)])
        for key in copies
    )
    if not shared:
        return ()
    for key in copies:
        del state[key]
    return tuple(copies)


def spread_heads(state: Mapping[str, Tensor], decoder: str) -> dict[str, Tensor]:
    """Give each decoder layer its heads, as the other implementations do.

    Args:
        state: in the keys of the other implementation, with our number of heads.
        decoder: prefix of the keys of its decoder, below which it repeats heads.

    Returns:
        The keys to add.
    """
    pattern = re.compile(re.escape(f"{decoder}layers.") + r"(\d+)\..+")
    layers = len({match[1] for key in state if (match := pattern.fullmatch(key))})
    two_stage = any(key.endswith(".enc_output.weight") for key in state)
    refined = any(index > 0 for _, _, index, _ in _heads(state))
    more = {}
    for key, kind, _, rest in _heads(state):
        if not refined:
            for index in range(1, layers):
                more[f"{kind}_embed.{index}.{rest}"] = state[key]
        elif kind == "bbox" or two_stage:
            more[decoder + key] = state[key]
    return more


def check_deformable(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse a Deformable-DETR where a DETR is needed.

    Raises:
        CheckpointError: ``state`` is one; ``what`` names the target.
    """
    if KEY in state:
        raise CheckpointError(f"{what} has no Deformable-DETR, which these weights are")


def check_same_system(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse weights of a Deformable-DETR for a DETR, and the reverse.

    Args:
        state: weights in our keys.
        own: state dict of the model.

    Raises:
        CheckpointError: names the key to set.
    """
    is_deformable, needed = KEY in state, KEY in own
    if is_deformable != needed and any(key.startswith("transformer.") for key in state):
        right = "DeformableDetr" if is_deformable else "MitiDetr"
        raise CheckpointError(
            f"these weights are {'' if is_deformable else 'not '}of a Deformable-DETR, the model "
            f"is {'one' if needed else 'none'}: set MODEL.META_ARCHITECTURE {right}"
        )


def _heads(state: Mapping[str, Tensor]) -> Iterator[tuple[str, str, int, str]]:
    """Key, ``class`` or ``bbox``, index and rest of the key of each tensor of a head."""
    for key in state:
        if match := _HEAD.fullmatch(key):
            yield key, match["kind"], int(match["index"]), match["rest"]
