"""Statistics of a comparison: functions of numbers, each with its formula."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

Numbers = Sequence[float] | np.ndarray

SPIKE_WINDOW = 50  # number of preceding iterations that a loss is compared with
SPIKE_FACTOR = 5.0  # robust standard deviations above the median of the window
# Ratio of standard deviation to median absolute deviation for normally distributed values.
_MAD_TO_SD = 1.4826


def mean_and_spread(values: Numbers) -> dict[str, Any] | None:
    """Return the mean and the sample standard deviation (n - 1) over the seeds.

    Args:
        values: one value per seed; non-finite values are left out.

    Returns:
        ``mean``, ``sd`` (None with fewer than two values) and ``n``; None without a value.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    spread = float(np.std(finite, ddof=1)) if len(finite) > 1 else None
    return {"mean": float(np.mean(finite)), "sd": spread, "n": len(finite)}


def paired_difference(
    values: Numbers, reference: Numbers, confidence: float = 0.95
) -> dict[str, Any] | None:
    """Return the mean difference of pairs with its interval by Student's t.

    d_i = values_i - reference_i; mean(d) -+ t((1 + confidence) / 2, n - 1) * sd(d) / sqrt(n).

    Args:
        values: n values, one per seed.
        reference: n values for the same seeds, in the same order. Non-finite pairs are left out.
        confidence: confidence level of the interval.

    Returns:
        ``mean``, ``low``, ``high`` (both None with fewer than two pairs) and ``n``; None without
        a pair.
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
    """Return the step at which a curve first reaches a level.

    The curve is linear between two points and starts with value 0 at step 0.

    Args:
        steps: increasing steps.
        values: values of the curve at ``steps``.
        level: level above 0.

    Returns:
        The step, or None if the level is not reached.
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
    """Count the iterations whose loss is far above the preceding ones.

    Iteration i is a spike if loss_i > m + 5 * 1.4826 * MAD, with m the median and MAD the median
    absolute deviation of the 50 losses before it.

    Args:
        losses: losses of all iterations, in order.

    Returns:
        Number of spikes, and the largest loss_i / m; (0, NaN) for 50 losses or fewer.
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
    """Return the largest drop of a curve below an earlier value, or 0 if it never drops."""
    array = np.asarray(values, dtype=float)
    return float((np.fmax.accumulate(array) - array).max(initial=0.0)) if len(array) else math.nan


def changed_share(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the share of objects whose matched query has changed, for each decoder layer.

    Args:
        before: (L, M) index of the query of each object, -1 for none.
        after: (L, M) the same at a later time.

    Returns:
        (L,) shares among the objects that have a query both times; NaN if there are none.
    """
    both = (before >= 0) & (after >= 0)
    counts = both.sum(axis=1)
    changed = ((before != after) & both).sum(axis=1)
    return np.where(counts > 0, changed / np.maximum(counts, 1), np.nan)


def query_use(queries: np.ndarray) -> tuple[int, float]:
    """Count the queries that are matched to objects.

    Args:
        queries: (M,) index of the query of each object, -1 for none.

    Returns:
        Number of different queries, and their effective number exp(H), with H the entropy of the
        share of objects per query. It equals Q if all Q queries have the same share.
    """
    counts = np.unique(queries[queries >= 0], return_counts=True)[1]
    shares = counts / max(counts.sum(), 1)
    return len(counts), float(np.exp(-(shares * np.log(shares)).sum()))
