"""Statistics agree with results worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from miti_detr.study.statistics import (
    changed_share,
    first_reached,
    largest_fall,
    loss_spikes,
    mean_and_spread,
    paired_difference,
    query_use,
)


def test_mean_and_spread() -> None:
    """Deviations -1, 0, 1: variance 2 / (3 - 1) = 1."""
    assert mean_and_spread([1.0, 2.0, 3.0, math.nan]) == {"mean": 2.0, "sd": 1.0, "n": 3}
    assert mean_and_spread([4.0]) == {"mean": 4.0, "sd": None, "n": 1}
    assert mean_and_spread([math.nan]) is None


def test_paired_difference() -> None:
    """d = 1, 2, 3: mean 2, sd 1, t(0.975; 2) = 4.302653: 2 -+ 4.302653 / sqrt(3)."""
    found = paired_difference([2.0, 4.0, 6.0, math.nan], [1.0, 2.0, 3.0, 4.0])
    half = 4.302653 / math.sqrt(3)
    expected = {"mean": 2.0, "low": 2 - half, "high": 2 + half, "n": 3}
    assert found == pytest.approx(expected, abs=1e-6)


def test_paired_difference_is_scipys() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5)).tolist()
    interval = stats.ttest_rel(a, b).confidence_interval(0.9)
    found = paired_difference(a, b, confidence=0.9)
    assert found is not None
    assert (found["low"], found["high"]) == pytest.approx(tuple(interval))


def test_one_pair_has_no_interval() -> None:
    assert paired_difference([3.0], [1.0]) == {"mean": 2.0, "low": None, "high": None, "n": 1}
    assert paired_difference([], []) is None


def test_first_reached() -> None:
    """Between (100, 10) and (200, 30), 15 is reached after a quarter; between (0, 0) and (100, 10),
    5 after half."""
    curve = ([100, 200, 300], [10.0, 30.0, 20.0])
    assert first_reached(*curve, 15) == 125
    assert first_reached(*curve, 5) == 50
    assert first_reached(*curve, 30) == 200
    assert first_reached(*curve, 30.1) is None


def test_loss_spikes() -> None:
    """50 losses 1, 2, ..., 50: median 25.5, MAD 12.5; the limit is 25.5 + 5 * 1.4826 * 12.5."""
    limit = 25.5 + 5 * 1.4826 * 12.5
    start = list(range(1, 51))
    assert loss_spikes([*start, limit - 0.01]) == (0, pytest.approx((limit - 0.01) / 25.5))
    assert loss_spikes([*start, limit + 0.01])[0] == 1
    assert loss_spikes(start)[0] == 0
    assert math.isnan(loss_spikes(start)[1])


def test_largest_fall() -> None:
    assert largest_fall([1.0, 5.0, 4.0, 6.0, 3.5, 7.0]) == 2.5
    assert largest_fall([1.0, 2.0]) == 0
    assert math.isnan(largest_fall([]))


def test_changed_share() -> None:
    """In layer 1 one of the objects 0, 1, 2 changes its query; in layer 2 none has a query."""
    before = np.array([[4, 5, 6, -1], [-1, -1, -1, -1]])
    after = np.array([[4, 5, 7, 8], [1, 2, 3, 4]])
    np.testing.assert_allclose(changed_share(before, after), [1 / 3, np.nan])


def test_query_use() -> None:
    """Shares 1/2, 1/4, 1/4: H = 1.5 ln 2, so 2 ** 1.5 queries; equal shares: all of them."""
    assert query_use(np.array([3, 3, 8, 1, -1])) == (3, pytest.approx(2**1.5))
    assert query_use(np.array([0, 1, 2])) == (3, pytest.approx(3))
    assert query_use(np.array([-1]))[0] == 0
