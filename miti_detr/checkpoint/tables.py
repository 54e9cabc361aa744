"""State-dict keys of other implementations, as tables: their pattern -> our template.

A pattern is a key with placeholders, which keep their value on the way: ``{i}`` a number, ``{p}``
a parameter (``weight`` or ``bias``), ``{n}`` a tensor of a frozen batch norm, ``{rest}`` anything.
A template of ``None`` means: known, and dropped on purpose. Rows with ``part`` hold a third of a
packed query-key-value tensor. Several patterns of one template are generations of the same
format; the first is the one that is written.

Sources: facebookresearch/detr ``models/`` and ``d2/converter.py`` at 29901c5, dddzg/up-detr at
44c0c6e, fundamentalvision/Deformable-DETR at 11169a6, huggingface/transformers ``models/detr`` and
``models/deformable_detr`` (4.x, and the module names of 5.x), torchvision
``models/resnet.py``, Detectron2 ``tools/convert-torchvision-to-d2.py``.
"""

import functools
import re
from typing import NamedTuple

PLACEHOLDERS = {
    "i": r"\d+",
    "p": "weight|bias",
    "n": "weight|bias|running_mean|running_var",
    "rest": ".+",
}


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        theirs: pattern of the key in the other format.
        ours: template of our key; None: dropped.
        part: 0, 1 or 2 for the query, key or value third (along dimension 0) of our packed tensor.
    """

    theirs: str
    ours: str | None
    part: int | None = None


@functools.cache
def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Compile a pattern or template of this module."""
    regex = re.escape(pattern)
    for name, kind in PLACEHOLDERS.items():
        regex = regex.replace(rf"\{{{name}\}}", f"(?P<{name}>{kind})")
    return re.compile(regex)


def under(prefix: str, rows: tuple[Row, ...], ours: str = "") -> tuple[Row, ...]:
    """Put prefixes before the keys of a table."""
    return tuple(
        Row(prefix + row.theirs, None if row.ours is None else ours + row.ours, row.part)
        for row in rows
    )


def same(*keys: str) -> tuple[Row, ...]:
    """Rows of keys that are equal in both formats."""
    return tuple(Row(key, key) for key in keys)


_STAGES = (1, 2, 3, 4)
_CONVS = (1, 2, 3)
BODY = "backbone.body."

# --- ResNets: rows lead to Detectron2's names ---

TORCHVISION_RESNET: tuple[Row, ...] = (
    Row("conv1.weight", "stem.conv1.weight"),
    Row("bn1.{n}", "stem.conv1.norm.{n}"),
    *(
        row
        for s in _STAGES
        for c in _CONVS
        for row in (
            Row(f"layer{s}.{{i}}.conv{c}.weight", f"res{s + 1}.{{i}}.conv{c}.weight"),
            Row(f"layer{s}.{{i}}.bn{c}.{{n}}", f"res{s + 1}.{{i}}.conv{c}.norm.{{n}}"),
        )
    ),
    *(
        row
        for s in _STAGES
        for row in (
            Row(f"layer{s}.{{i}}.downsample.0.weight", f"res{s + 1}.{{i}}.shortcut.weight"),
            Row(f"layer{s}.{{i}}.downsample.1.{{n}}", f"res{s + 1}.{{i}}.shortcut.norm.{{n}}"),
        )
    ),
    Row("{rest}.num_batches_tracked", None),
)

DETECTRON2_RESNET: tuple[Row, ...] = (
    *same("stem.conv1.weight", "stem.conv1.norm.{n}"),
    *(
        row
        for s in _STAGES
        for name in ("conv1", "conv2", "conv3", "shortcut")
        for row in same(f"res{s + 1}.{{i}}.{name}.weight", f"res{s + 1}.{{i}}.{name}.norm.{{n}}")
    ),
    Row("{rest}.num_batches_tracked", None),
)

_HF_RESNET: tuple[Row, ...] = (
    Row("embedder.embedder.convolution.weight", "stem.conv1.weight"),
    Row("embedder.embedder.normalization.{n}", "stem.conv1.norm.{n}"),
    *(
        row
        for s in _STAGES
        for theirs, ours in (*((f"layer.{c - 1}", f"conv{c}") for c in _CONVS), ("shortcut",) * 2)
        for row in (
            Row(
                f"encoder.stages.{s - 1}.layers.{{i}}.{theirs}.convolution.weight",
                f"res{s + 1}.{{i}}.{ours}.weight",
            ),
            Row(
                f"encoder.stages.{s - 1}.layers.{{i}}.{theirs}.normalization.{{n}}",
                f"res{s + 1}.{{i}}.{ours}.norm.{{n}}",
            ),
        )
    ),
    Row("{rest}.num_batches_tracked", None),
)

# --- transformer and heads: the published names, which are ours ---

PACKED = ("in_proj_{p}", "out_proj.{p}")
LAYERS = tuple(
    f"transformer.{stack}.layers.{{i}}.{name}.{{p}}"
    for stack, norms in (("encoder", 2), ("decoder", 3))
    for name in ("linear1", "linear2", *(f"norm{n + 1}" for n in range(norms)))
)

_DETECTOR: tuple[Row, ...] = same(
    "input_proj.{p}",
    "query_embed.weight",
    "class_embed.{p}",
    "bbox_embed.layers.{i}.{p}",
    *(
        f"transformer.{stack}.layers.{{i}}.{attention}.{name}"
        for stack, attention in (
            ("encoder", "self_attn"),
            ("decoder", "self_attn"),
            ("decoder", "multihead_attn"),
        )
        for name in PACKED
    ),
    *LAYERS,
    "transformer.encoder.norm.{p}",
    "transformer.decoder.norm.{p}",
)

POSITIONS: tuple[Row, ...] = (
    Row("backbone.1.row_embed.weight", "position_encoding.row_embed.weight"),
    Row("backbone.1.col_embed.weight", "position_encoding.col_embed.weight"),
)
MASK_HEAD = same(
    "bbox_attention.q_linear.{p}",
    "bbox_attention.k_linear.{p}",
    *(f"mask_head.{name}{{i}}.{{p}}" for name in ("lay", "gn", "adapter")),
    "mask_head.out_lay.{p}",
)

DETR = (*under("backbone.0.body.", TORCHVISION_RESNET, BODY), *POSITIONS, *_DETECTOR)
UP_DETR_PRETRAIN = (*DETR, *same("patch2query.{p}", "feature_align.layers.{i}.{p}"))
D2_WRAPPER = (
    *under("detr.backbone.0.backbone.", DETECTRON2_RESNET, BODY),
    *under("detr.", (*POSITIONS, *_DETECTOR)),
    Row("criterion.empty_weight", None),
)

# --- Hugging Face: attention projections apart, two generations of names ---


def hf_attention(theirs: str, ours: str) -> tuple[Row, ...]:
    """Rows of an attention module of Hugging Face."""
    return (
        *(Row(f"{theirs}.{x}_proj.{{p}}", f"{ours}.in_proj_{{p}}", i) for i, x in enumerate("qkv")),
        Row(f"{theirs}.out_proj.{{p}}", f"{ours}.out_proj.{{p}}"),
        Row(f"{theirs}.o_proj.{{p}}", f"{ours}.out_proj.{{p}}"),
    )


def hf_rows(stack: str, names: dict[str, str]) -> tuple[Row, ...]:
    """Rows of the modules of a layer of Hugging Face, from their names to ours."""
    theirs, ours = f"model.{stack}.layers.{{i}}", f"transformer.{stack}.layers.{{i}}"
    return tuple(Row(f"{theirs}.{a}.{{p}}", f"{ours}.{b}.{{p}}") for a, b in names.items())


def _hf_layer(stack: str, names: dict[str, str]) -> tuple[Row, ...]:
    theirs, ours = f"model.{stack}.layers.{{i}}", f"transformer.{stack}.layers.{{i}}"
    return *hf_rows(stack, names), *hf_attention(f"{theirs}.self_attn", f"{ours}.self_attn")


FEED_FORWARD = {"fc1": "linear1", "fc2": "linear2", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}

HF_BACKBONE = (
    *(
        row
        for prefix in ("model.backbone.conv_encoder.model.", "model.backbone.model.")
        for resnet in (TORCHVISION_RESNET, _HF_RESNET)
        for row in under(prefix, resnet, BODY)
    ),
    *(
        Row(f"model.{prefix}position_embedding.{theirs}.weight", f"position_encoding.{ours}.weight")
        for prefix in ("", "backbone.")
        for theirs, ours in (("row_embeddings", "row_embed"), ("column_embeddings", "col_embed"))
    ),
)

HF = (
    *HF_BACKBONE,
    Row("model.input_projection.{p}", "input_proj.{p}"),
    Row("model.query_position_embeddings.weight", "query_embed.weight"),
    Row("class_labels_classifier.{p}", "class_embed.{p}"),
    Row("bbox_predictor.layers.{i}.{p}", "bbox_embed.layers.{i}.{p}"),
    *_hf_layer(
        "encoder",
        {**FEED_FORWARD, "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2"},
    ),
    *_hf_layer(
        "decoder",
        {
            **FEED_FORWARD,
            "self_attn_layer_norm": "norm1",
            "encoder_attn_layer_norm": "norm2",
            "final_layer_norm": "norm3",
        },
    ),
    *hf_attention(
        "model.decoder.layers.{i}.encoder_attn", "transformer.decoder.layers.{i}.multihead_attn"
    ),
    Row("model.decoder.layernorm.{p}", "transformer.decoder.norm.{p}"),
)

# The published names, and those of 5.x
HF_MASK_HEAD = (
    *MASK_HEAD,
    *(Row(f"bbox_attention.{x}_proj.{{p}}", f"bbox_attention.{x}_linear.{{p}}") for x in "qk"),
    *(
        Row(f"mask_head.{theirs}.{part}.{{p}}", f"mask_head.{ours}{i}.{{p}}")
        for i, theirs in enumerate(
            ("conv1", "conv2", *(f"fpn_stages.{level}.refine" for level in range(3))), start=1
        )
        for part, ours in (("conv", "lay"), ("norm", "gn"))
    ),
    *(
        Row(
            f"mask_head.fpn_stages.{level}.fpn_adapter.{{p}}", f"mask_head.adapter{level + 1}.{{p}}"
        )
        for level in range(3)
    ),
    Row("mask_head.output_conv.{p}", "mask_head.out_lay.{p}"),
)
