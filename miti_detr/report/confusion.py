"""Which class is taken for which."""

import numpy as np

from .arrays import Detections, Truth
from .matching import THRESHOLDS, Matches, Pairs, match_greedily


def confusion_matrix(
    truth: Truth, detections: Detections, pairs: Pairs, matches: Matches, threshold: float
) -> np.ndarray:
    """Count objects by their class and by the class of the detection that finds them.

    An object belongs to the detection of its class that finds it at IoU 0.5, as for precision and
    recall. Then the remaining detections find remaining objects of other classes, in the order of
    their scores. Ignored detections and crowds are left out.

    Args:
        truth: the objects.
        detections: of a model.
        pairs: of :func:`~miti_detr.report.matching.find_pairs`.
        matches: of :func:`~miti_detr.report.matching.match`.
        threshold: lowest score.

    Returns:
        (K + 1, K + 1) counts; rows are classes of objects, columns of detections. The last row has
        detections of background, the last column has missed objects.
    """
    classes = len(truth.class_names)
    matrix = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    kept = (detections.score >= threshold) & ~matches.ignored[0]
    true = kept & matches.true[0]
    free = matches.counts.copy()
    free[matches.object[0][true]] = False
    np.add.at(matrix, (detections.label[true], detections.label[true]), 1)
    false = kept & ~true
    candidates = pairs.take(
        false[pairs.detection] & free[pairs.object] & (pairs.iou >= THRESHOLDS[0])
    )
    none = np.zeros(len(free), dtype=bool)
    found = match_greedily(candidates, detections.image, THRESHOLDS[:1], none, none)[0]
    taken = np.flatnonzero(found >= 0)
    np.add.at(matrix, (truth.label[found[taken]], detections.label[taken]), 1)
    free[found[taken]] = False
    false[taken] = False
    np.add.at(matrix, (classes, detections.label[false]), 1)
    np.add.at(matrix, (truth.label[free], classes), 1)
    return matrix
