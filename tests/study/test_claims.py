"""Verdicts of a study agree with results worked out by hand and with scipy."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from miti_detr.study.claims import (
    POWER,
    bootstrap_interval,
    claims_table,
    detectable_difference,
    holm,
    p_value,
    verdict,
)
from miti_detr.study.comparison import compare_runs
from tests.study.made_runs import write_run


def test_holm_by_hand() -> None:
    """In order: 0.01 * 4, 0.02 * 3, max(0.06, 0.025 * 2), max(0.06, 0.9 * 1)."""
    assert holm([0.02, 0.9, 0.01, 0.025]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]


def test_the_p_value_is_scipys() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    assert p_value(a - b) == pytest.approx(float(stats.ttest_rel(a, b).pvalue))
    assert p_value([0.0, 0.0]) == 1
    assert p_value([2.0, 2.0]) == 0


def test_the_bootstrap_of_two_seeds_by_hand() -> None:
    """The mean of two draws from {0, 1} is 0 and 1 with a probability of 1/4 each."""
    assert bootstrap_interval([0.0, 1.0]) == (0, 1)
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)


@pytest.mark.slow
def test_the_detectable_difference_is_found_with_the_stated_power() -> None:
    n, spread = 4, 2.0
    scale = np.array([-1.0, -1, 1, 1]) * spread * np.sqrt(3 / 4)  # sample sd: spread
    difference = detectable_difference(scale)
    samples = np.random.default_rng(1).normal(difference, spread, (20_000, n))
    found = stats.ttest_1samp(samples, 0, axis=1)
    assert float((found.pvalue < 0.05).mean()) == pytest.approx(POWER, abs=0.01)


def test_a_verdict_needs_a_small_p() -> None:
    assert [verdict(1, 0.04), verdict(-1, 0.04), verdict(1, 0.05)] == [
        "higher",
        "lower",
        "undecided",
    ]


def test_all_arms_with_a_reference_are_one_family(tmp_path: Path) -> None:
    """Differences 5, 6, 7 (t = 6 sqrt 3, p = 0.0091) and -3, 0, 3 (p = 1)."""
    paths = []
    for name, shifts in {"detr": (0, 0, 0), "miti": (5, 6, 7), "other": (-3, 0, 3)}.items():
        for seed, shift in enumerate(shifts):
            aps = [10.0 + seed, 20.0 + seed + shift]
            paths.append(write_run(tmp_path / name / f"seed_{seed}", aps, seed=seed, residual=name))
    table = claims_table(compare_runs(paths))
    assert table is not None
    names, metrics, pairs, differences, _, p, verdicts, _ = zip(*table.rows, strict=True)
    assert names == ("miti \u2212 detr", "other \u2212 detr")
    assert metrics == ("AP", "AP")
    assert pairs == (3, 3)
    assert [cell["mean"] for cell in differences] == pytest.approx([6, 0])
    assert p == ("0.018", "1")
    assert verdicts == ("higher", "undecided")
    assert claims_table(compare_runs(paths[:4])) is None  # one pair
