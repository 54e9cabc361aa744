"""Intervals over resampled images, for AP and for the paired difference of two models."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from .average_precision import PrecisionCounter, mean

PERCENT = (2.5, 97.5)  # a 95 % interval


@dataclasses.dataclass(frozen=True)
class Samples:
    """APs of resampled images, in 0..100.

    Attributes:
        ap: (R) AP of each resample.
        ap50: (R) the same at IoU 0.5.
        classes: (R, K) AP of each class; NaN where a resample has no object of it.
    """

    ap: np.ndarray
    ap50: np.ndarray
    classes: np.ndarray


def resample(
    counters: Sequence[PrecisionCounter], images: int, *, resamples: int, seed: int
) -> list[Samples]:
    """Draw as many images as there are, with replacement, and compute the APs of each model.

    Args:
        counters: of the models, all of which see the same resamples.
        images: number of images.
        resamples: number of resamples R.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    shares = np.full(images, 1 / images)
    found: list[list[tuple[float, float, np.ndarray]]] = [[] for _ in counters]
    for _ in range(resamples):
        counts = rng.multinomial(images, shares)
        for samples, counter in zip(found, counters, strict=True):
            ap, _ = counter(counts)
            # A class has objects at all IoUs or at none.
            samples.append((mean(ap), mean(ap[0]), ap.mean(axis=0)))
    return [
        Samples(*(100 * np.array(column) for column in zip(*samples, strict=True)))
        for samples in found
    ]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of samples, by percentiles; NaN if there are none."""
    kept = values[~np.isnan(values)]
    if not len(kept):
        return float("nan"), float("nan")
    low, high = np.percentile(kept, PERCENT)
    return float(low), float(high)
