"""Counts of parameters and operations against formulas."""

import itertools

import pytest
from detectron2.modeling import build_model

from benchmarks.model import count_model
from benchmarks.spec import bench_config
from tests.benchmarks.helpers import small_spec

# Of the small model: image 64 x 96 at stride 32, C, feed-forward width, queries, K+1, heads
TOKENS, C, F, Q, K1 = 2 * 3, 32, 64, 7, 6
ENCODER_LAYERS, DECODER_LAYERS = 1, 2


@pytest.fixture(scope="module")
def counts() -> dict[str, dict]:
    spec = small_spec()
    return {peer: count_model(spec, peer) for peer in ("ours", "detr")}


def linear(rows: int, *widths: int) -> int:
    return sum(rows * a * b for a, b in itertools.pairwise(widths))


def attention(queries: int, keys: int) -> int:
    """Four projections, the logits, the weighted sum."""
    return 2 * linear(queries, C, C) + 2 * linear(keys, C, C) + 2 * queries * keys * C


@pytest.mark.slow
def test_operations_of_the_parts(counts: dict[str, dict]) -> None:
    """Multiply-adds; fvcore counts 5 a value for a norm. Only the last layer has heads here."""
    norm = 5 * C
    encoder = attention(TOKENS, TOKENS) + linear(TOKENS, C, F, C) + 2 * TOKENS * norm
    decoder = attention(Q, Q) + attention(Q, TOKENS) + linear(Q, C, F, C) + 3 * Q * norm
    last_norm = Q * norm  # of every layer's states
    expected = {
        "input_proj": linear(TOKENS, 512, C),
        "transformer": ENCODER_LAYERS * encoder + DECODER_LAYERS * (decoder + last_norm),
        "class_embed": linear(Q, C, K1),
        "bbox_embed": linear(Q, C, C, C, 4),
    }
    found = counts["ours"]["flops_of"]
    assert {part: found[part] for part in expected} == expected
    # The frozen norms are counted as operations of the backbone, too.
    assert sum(found.values()) == pytest.approx(counts["ours"]["flops"], rel=1e-6)


def test_operations_of_the_backbone(counts: dict[str, dict]) -> None:
    """All convolutions, and at most a few operations a value of their outputs for the norms."""
    spec = small_spec()
    model = build_model(bench_config(spec))
    strides = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
    products = values = 0
    for name, parameter in model.backbone.named_parameters():
        if parameter.dim() == 4:
            stage = next(s for s in strides if s in name)
            area = (64 // strides[stage]) * (96 // strides[stage])
            products += area * parameter.numel()
            values += area * len(parameter)
    assert products <= counts["ours"]["flops_of"]["backbone"] <= products + 5 * values


def test_the_residual_adds_additions_only(counts: dict[str, dict]) -> None:
    """One of the layer's input in each layer."""
    ours, detr = counts["ours"], counts["detr"]
    for key in ("parameters", "trainable", "flops", "flops_of", "size"):
        assert ours[key] == detr[key]
    more = (ENCODER_LAYERS * TOKENS + DECODER_LAYERS * Q) * C
    assert ours["additions"] - detr["additions"] == more
