"""Intervals against pycocotools on data sets whose images are drawn with replacement."""

import numpy as np
import pytest

from miti_detr.report.bootstrap import interval, resample
from miti_detr.report.evaluation import evaluate
from tests.report.made import coco_eval, made_detections, made_truth


@pytest.mark.slow
def test_resamples_are_those_of_pycocotools() -> None:
    """Both models see the same images; AP, AP50 and AP of each class, in 0..100."""
    images, resamples = 10, 6
    truth = made_truth(0, images=images)
    models = [made_detections(truth, seed) for seed in (1, 2)]
    counters = [evaluate(truth, model).counter for model in models]
    found = resample(counters, images, resamples=resamples, seed=3)
    rng = np.random.default_rng(3)
    for index in range(resamples):
        counts = rng.multinomial(images, np.full(images, 1 / images))
        drawn = np.repeat(np.arange(images), counts).tolist()
        for samples, model in zip(found, models, strict=True):
            evaluation = coco_eval(truth, model, drawn)
            assert samples.ap[index] == pytest.approx(100 * evaluation.stats[0], abs=1e-9)
            assert samples.ap50[index] == pytest.approx(100 * evaluation.stats[1], abs=1e-9)
            precision = evaluation.eval["precision"][:, :, :, 0, -1].mean((0, 1))
            wanted = np.where(precision < 0, np.nan, 100 * precision)
            np.testing.assert_allclose(samples.classes[index], wanted, rtol=0, atol=1e-9)


def test_a_model_does_not_differ_from_itself() -> None:
    truth = made_truth(0)
    counter = evaluate(truth, made_detections(truth, 0)).counter
    first, second = resample([counter, counter], len(truth.files), resamples=20, seed=0)
    assert interval(first.ap - second.ap) == (0, 0)
    low, high = interval(first.ap)
    assert low < high


def test_intervals_leave_out_resamples_without_objects() -> None:
    """2.5 % and 97.5 % of 0, 1, ..., 40 are 1 and 39."""
    values = np.append(np.arange(41.0), np.nan)
    assert interval(values) == (1, 39)
    assert np.isnan(interval(values[-1:])).all()
