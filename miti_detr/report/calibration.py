"""Whether a detection with a score of 0.7 is true in 70 of 100 cases."""

import dataclasses

import numpy as np

BINS = 10


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Detections by score, in bins of equal width.

    Attributes:
        count: (BINS) number of detections.
        score: (BINS) mean score; NaN for empty bins.
        precision: (BINS) share of true detections; NaN for empty bins.
    """

    count: np.ndarray
    score: np.ndarray
    precision: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: mean of |precision - score| over bins, by their counts."""
        if not self.count.sum():
            return float("nan")
        difference = np.nan_to_num(np.abs(self.precision - self.score))
        return float((self.count * difference).sum() / self.count.sum())


def calibrate(score: np.ndarray, true: np.ndarray) -> Calibration:
    """Compare scores with the share of true detections.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, for detections.

    Args:
        score: (D) in [0, 1].
        true: (D) bool.
    """
    bins = np.minimum((score * BINS).astype(np.int64), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean_score = np.bincount(bins, score, minlength=BINS) / count
        precision = np.bincount(bins, true, minlength=BINS) / count
    return Calibration(count, mean_score, precision)
