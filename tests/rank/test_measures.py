"""Measures of token matrices agree with their formulas."""

import math

import pytest
import torch

from miti_detr import rank

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tokens(n: int = 30, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_relative_residual_is_free_of_scale_and_one_for_centred_tokens():
    x = tokens()
    torch.testing.assert_close(rank.relative_residual(1e6 * x), rank.relative_residual(x), **EXACT)
    assert float(rank.relative_residual(x - x.mean(0))) == pytest.approx(1, abs=1e-12)
    assert float(rank.relative_residual(x + 3)) < 1


def test_equal_tokens_have_rank_one():
    """x_i = v: residual 0, cosine 1, one singular value |v| sqrt(n)."""
    found = rank.measure_tokens(torch.arange(1.0, 9.0).expand(30, 8))
    assert found["residual"] < 1e-15
    assert found["residual_fro"] < 1e-15
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    assert found["stable_rank"] == pytest.approx(1, abs=1e-12)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-5)  # Gram matrix: 1e-8 of rounding
    assert found["std"] == pytest.approx(math.sqrt((64 - 1) / 12), abs=1e-12)


def test_orthogonal_tokens_have_full_rank():
    """The d unit vectors: d equal singular values, cosine 0."""
    found = rank.measure_tokens(torch.eye(8))
    assert found["effective_rank"] == pytest.approx(8, abs=1e-9)
    assert found["stable_rank"] == pytest.approx(8, abs=1e-9)
    assert found["cosine"] == pytest.approx(0, abs=1e-12)


def test_composite_norm():
    """[[1, -2], [3, 4]] has column sums 4 and 6 and row sums 3 and 7: sqrt(42). The triangle
    inequality fails: a row and a column of ones have 10 each, and their sum has 101."""
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(rank.composite_norm(x), torch.tensor(42.0).double().sqrt(), **EXACT)
    row, column = torch.zeros(100, 100), torch.zeros(100, 100)
    row[0], column[:, 0] = 1, 1
    assert [float(rank.composite_norm(m)) for m in (row, column, row + column)] == [10, 10, 101]


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (9, 9)])
def test_singular_values_are_those_of_the_svd(shape):
    x = tokens(*shape)
    torch.testing.assert_close(
        rank.singular_values(x), torch.linalg.svdvals(x), rtol=1e-9, atol=1e-7
    )


def test_mean_cosine_of_pairs():
    """The O(n d) formula equals the mean over all pairs."""
    x = tokens() + 1
    unit = x / x.norm(dim=1, keepdim=True)
    pairs = (unit @ unit.T)[~torch.eye(30, dtype=torch.bool)]
    torch.testing.assert_close(rank.mean_cosine(x), pairs.mean(), **EXACT)
    assert math.isnan(rank.mean_cosine(x[:1]))


def test_entropy_counts_keys_that_are_not_padding():
    uniform = torch.zeros(2, 3, 10)
    uniform[..., :4] = 0.25
    assert float(rank.attention_entropy(uniform, 4)) == pytest.approx(1)
    assert float(rank.attention_entropy(torch.eye(5), 5)) == 0
    assert math.isnan(rank.attention_entropy(torch.ones(1, 1), 1))


def test_published_residual_keeps_what_the_tokens_share():
    """Equation (14) holds for tokens that are nearly rank one, so it does not measure rank. It
    fails for a layer that cancels its input."""
    x = torch.ones(30, 8, dtype=torch.float64)
    change = 0.01 * tokens()
    found = rank.measure_step(x, x + change)
    assert found["norm_published"] > 50 * found["norm_residual"]
    assert found["norm_residual"] == pytest.approx(found["norm_residual_change"], rel=1e-9)
    x = tokens()
    cancelled = rank.measure_step(x, torch.zeros_like(x))
    assert cancelled["norm_residual"] == 0 < cancelled["norm_residual_change"]
    shared = x.mean(0).expand_as(x)
    torch.testing.assert_close(rank.published_residual(x, 0 * x), shared, **EXACT)


def test_tokens_of_zero_have_no_ratio():
    found = rank.measure_tokens(torch.zeros(5, 4))
    assert all(math.isnan(found[key]) for key in ("residual", "cosine", "stable_rank"))
    assert found["std"] == 0
