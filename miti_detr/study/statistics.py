"""The statistics of a comparison: plain functions of numbers, each with its formula."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

Numbers = Sequence[float] | np.ndarray

SPIKE_WINDOW = 50  # iterations before the one that is judged
SPIKE_FACTOR = 5.0  # robust standard deviations above their median
# Median absolute deviation to standard deviation, for normally distributed values
_MAD_TO_SD = 1.4826


def mean_and_spread(values: Numbers) -> dict[str, Any] | None:
    """Mean and standard deviation (of a sample, n - 1) over the seeds.

    Args:
        values: one for each seed; not-finite ones are left out.

    Returns:
        ``mean``, ``sd`` (None with less than two values) and ``n``; None without a value.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    spread = float(np.std(finite, ddof=1)) if len(finite) > 1 else None
    return {"mean": float(np.mean(finite)), "sd": spread, "n": len(finite)}


def paired_difference(
    values: Numbers, reference: Numbers, confidence: float = 0.95
) -> dict[str, Any] | None:
    """Mean difference of pairs with the interval of Student's t.

    d_i = values_i - reference_i; mean(d) -+ t((1 + confidence) / 2, n - 1) * sd(d) / sqrt(n).

    Args:
        values: n, one for each seed.
        reference: n, of the same seeds in the same order; a pair that is not finite is left out.
        confidence: of the interval.

    Returns:
        ``mean``, ``low``, ``high`` (both None with less than two pairs) and ``n``; None without a
        pair.
    """
    difference = np.subtract(values, reference)
    difference = difference[np.isfinite(difference)]
    n = len(difference)
    if n == 0:
        return None
    mean = float(difference.mean())
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * difference.std(ddof=1) / math.sqrt(n))
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def first_reached(steps: Numbers, values: Numbers, level: float) -> float | None:
    """Say when a curve first reaches a level.

    Linear between two points; before the first one the curve comes from 0 at step 0.

    Args:
        steps: rising.
        values: of the same length.
        level: above 0.

    Returns:
        The step, None if the level is not reached.
    """
    before = (0.0, 0.0)
    for step, value in zip(steps, values, strict=True):
        if value >= level:
            share = (level - before[1]) / (value - before[1])
            return before[0] + share * (step - before[0])
        if math.isfinite(value):
            before = (step, value)
    return None


def loss_spikes(losses: Numbers) -> tuple[int, float]:
    """Count the iterations whose loss stands out of those before it.

    Iteration i is a spike if loss_i > m + 5 * 1.4826 * MAD, with m the median and MAD the median
    absolute deviation of the 50 losses before it.

    Args:
        losses: of every iteration in order.

    Returns:
        Number of spikes, and the largest loss_i / m; (0, NaN) for 50 losses or less.
    """
    array = np.asarray(losses, dtype=float)
    if len(array) <= SPIKE_WINDOW:
        return 0, math.nan
    before = np.lib.stride_tricks.sliding_window_view(array, SPIKE_WINDOW)[:-1]
    median = np.median(before, axis=1)
    deviation = _MAD_TO_SD * np.median(np.abs(before - median[:, None]), axis=1)
    judged = array[SPIKE_WINDOW:]
    spikes = judged > median + SPIKE_FACTOR * deviation
    return int(spikes.sum()), float((judged / median).max())


def largest_fall(values: Numbers) -> float:
    """Return how far a curve falls at most below an earlier value; 0 for one that never falls."""
    array = np.asarray(values, dtype=float)
    return float((np.fmax.accumulate(array) - array).max(initial=0.0)) if len(array) else math.nan


def changed_share(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Share of the objects that another query finds than before, for each decoder layer.

    Args:
        before: (L, M) queries, -1 for an object without one.
        after: (L, M) likewise, later.

    Returns:
        (L,), over the objects that have a query both times; NaN where there are none.
    """
    both = (before >= 0) & (after >= 0)
    counts = both.sum(axis=1)
    changed = ((before != after) & both).sum(axis=1)
    return np.where(counts > 0, changed / np.maximum(counts, 1), np.nan)


def query_use(queries: np.ndarray) -> tuple[int, float]:
    """Say how many queries find objects.

    Args:
        queries: (M,) of each object, -1 for none.

    Returns:
        Number of different queries, and their effective number exp(H), with H the entropy of the
        shares of the objects that each finds: Q if all find the same number.
    """
    counts = np.unique(queries[queries >= 0], return_counts=True)[1]
    shares = counts / max(counts.sum(), 1)
    return len(counts), float(np.exp(-(shares * np.log(shares)).sum()))
