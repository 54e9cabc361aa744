"""Known properties of rank collapse at initialisation, for small sizes."""

import itertools

import pytest
import torch

from miti_detr.rank.theory import (
    TheorySpec,
    decoder_panel,
    encoder_panel,
    pure_attention,
)

SMALL = TheorySpec(grid=(9, 12), d_model=128, nhead=4, dim_feedforward=512, depth=6, seeds=1)


def test_pure_attention_collapses_doubly_exponentially_only_without_positions():
    """In float64, without positions the number of lost digits multiplies and nothing is left after
    three layers; with positions each layer removes about as much as the one before."""
    without = pure_attention(SMALL, "shared", positions=False, depth=3)
    assert without[2] < 1e-5
    assert without[3] < 1e-14
    r = pure_attention(SMALL, "shared", positions=True)
    assert 1e-8 < r[3] < 1e-4
    factors = [a / b for a, b in itertools.pairwise(r[2:])]
    assert max(factors) < 10 * min(factors)


@pytest.mark.parametrize("seed", range(3))
def test_order_of_the_variants(seed, monkeypatch):
    """After 6 layers: pure attention << DETR < before_norm < after_norm, for every seed."""
    monkeypatch.setattr(TheorySpec, "encoder", _other_seed(TheorySpec.encoder, seed))
    variants = ("san", "none", "before_norm", "after_norm")
    panel = encoder_panel(SMALL, "shared", variants=variants)
    r = [panel[name][6]["residual"] for name in variants]
    assert r == sorted(r)
    assert r[0] < 1e-5 * r[1]
    std = [panel[name][6]["std"] for name in variants]
    assert std[1] == pytest.approx(1, abs=1e-3)  # after a LayerNorm
    assert std[3] > 3


def _other_seed(method, shift):
    return lambda self, seed: method(self, seed + shift)


def test_decoder_starts_nearly_at_rank_one():
    """The states start at zero, and queries enter only through queries and keys."""
    panel = decoder_panel(SMALL, variants=("none", "before_norm", "after_norm"))
    r = [layers[6]["residual"] for layers in panel.values()]
    assert r == sorted(r)
    assert r[0] < 0.02


@pytest.mark.slow
def test_decoder_of_full_size_equals_that_of_the_published_layers():
    """Layer 1 with 850 tokens, mean of seeds 0 to 2: r and std agree with the published layers."""
    measured = {"none": (0.00233, 1.000), "pre none": (0.00593, 0.751)}
    panel = decoder_panel(TheorySpec(depth=1), variants=tuple(measured))
    for name, (r, std) in measured.items():
        assert panel[name][1]["residual"] == pytest.approx(r, rel=0.005)
        assert panel[name][1]["std"] == pytest.approx(std, rel=0.001)


def test_panel_is_the_layer_of_the_model():
    """`before_norm` of the panel equals the encoder of a Miti-DETR with these weights."""
    panel = encoder_panel(SMALL, "independent", variants=("before_norm",))
    encoder = SMALL.encoder(0)
    x = SMALL.tokens("independent", 0)
    for layer in encoder.layers:
        layer.residual.placement = "before_norm"
    with torch.no_grad():
        x = encoder(x, SMALL.positions(), None)
    std = float(x.double().std(dim=2, correction=0).mean())
    assert panel["before_norm"][6]["std"] == pytest.approx(std, rel=1e-6)
