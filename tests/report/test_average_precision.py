"""AP against pycocotools, also of resampled images."""

import numpy as np
import pytest

from miti_detr.report.arrays import sort_detections
from miti_detr.report.average_precision import (
    PrecisionCounter,
    coco_statistics,
    marks_of,
)
from miti_detr.report.matching import find_pairs, match
from tests.report.made import coco_eval, made_detections, made_truth

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")


@pytest.mark.parametrize("seed", range(6))
def test_the_twelve_numbers_are_those_of_pycocotools(seed: int) -> None:
    truth = made_truth(seed)
    detections = made_detections(truth, seed)
    found = coco_statistics(truth, detections, find_pairs(truth, detections))
    assert tuple(found) == NAMES
    stats = coco_eval(truth, detections).stats
    wanted = np.where(stats < 0, np.nan, 100 * stats)
    np.testing.assert_allclose(list(found.values()), wanted, rtol=0, atol=1e-9)


def test_equal_boxes_and_scores() -> None:
    """Ties: the same detections and objects several times, with the same scores."""
    truth = made_truth(1, images=4)
    twice = np.repeat(np.arange(len(truth.image)), 2)
    truth = type(truth)(
        truth.class_names,
        truth.files,
        truth.sizes,
        *(getattr(truth, name)[twice] for name in ("image", "label", "boxes", "area", "crowd")),
    )
    d = made_detections(truth, 0)
    detections = sort_detections(d.image, d.label, d.boxes, np.round(d.score, 1))
    found = coco_statistics(truth, detections, find_pairs(truth, detections))
    stats = coco_eval(truth, detections).stats
    wanted = np.where(stats < 0, np.nan, 100 * stats)
    np.testing.assert_allclose(list(found.values()), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_resample_is_a_data_set_with_repeated_images(seed: int) -> None:
    """AP of each class and IoU, and recall, where images count 0, 1, 2, ... times."""
    truth = made_truth(seed, images=10)
    detections = made_detections(truth, seed)
    matches = match(truth, detections, find_pairs(truth, detections))
    counter = PrecisionCounter(marks_of(truth, detections, matches))
    images = np.random.default_rng(seed).integers(0, 10, 10)
    ap, recall = counter(np.bincount(images, minlength=10))
    evaluation = coco_eval(truth, detections, images.tolist())
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (T, R, K)
    wanted = np.where((precision < 0).any(1), np.nan, precision.mean(1))
    np.testing.assert_allclose(ap, wanted, rtol=0, atol=1e-9)
    recalls = evaluation.eval["recall"][:, :, 0, -1]
    np.testing.assert_allclose(recall, np.where(recalls < 0, np.nan, recalls), rtol=0, atol=1e-9)
