"""Precision, recall, F1, thresholds, calibration, confusion and groups, each counted by loops."""

import numpy as np
import pytest

from miti_detr.report.calibration import calibrate
from miti_detr.report.evaluation import Evaluation, evaluate
from miti_detr.report.thresholds import (
    best_threshold,
    curve_of,
    f1_at,
    operate,
    precision_at_recalls,
    verified_images,
)
from tests.report.made import coco_eval, iou, made_detections, made_truth


@pytest.fixture(scope="module", params=range(2))
def evaluation(request: pytest.FixtureRequest) -> Evaluation:
    truth = made_truth(request.param, images=40)
    return evaluate(truth, made_detections(truth, request.param, noise=2))


class Counted:
    """True, false and missed at a threshold, from what pycocotools says of each detection."""

    def __init__(self, e: Evaluation, threshold: float, images: set[int], labels: set[int]) -> None:
        self.true = self.false = self.objects = 0
        self.pairs: list[tuple[float, bool]] = []
        for image in coco_eval(e.truth, e.detections).evalImgs:
            if image is None or image["aRng"] != [0, 1e10]:
                continue
            if image["image_id"] - 1 not in images or image["category_id"] - 1 not in labels:
                continue
            self.objects += int((np.array(image["gtIgnore"]) == 0).sum())
            for score, object_id, ignored in zip(
                image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0], strict=True
            ):
                if not ignored:
                    self.pairs.append((score, object_id > 0))
                if not ignored and score >= threshold:
                    self.true += object_id > 0
                    self.false += object_id == 0
        self.missed = self.objects - self.true

    def f1(self, threshold: float) -> float:
        kept = [true for score, true in self.pairs if score >= threshold]
        return 2 * sum(kept) / (len(kept) + self.objects)


def test_thresholds_are_chosen_on_one_half_and_verified_on_the_other(
    evaluation: Evaluation,
) -> None:
    e = evaluation
    second = set(np.flatnonzero(verified_images(40, 0)).tolist())
    first = set(range(40)) - second
    assert len(first) == len(second) == 20
    everything = {0, 1, 2}
    cases = [(e.thresholds.verified, e.thresholds.on_choice, everything)]
    cases += [(o, None, {label}) for label, o in enumerate(e.thresholds.classes)]  # type: ignore[misc]
    for verified, on_choice, labels in cases:
        assert verified is not None
        threshold = verified.threshold
        other = Counted(e, threshold, second, labels)
        assert (verified.true, verified.false) == (other.true, other.false)
        assert verified.missed == other.missed
        assert verified.precision == other.true / (other.true + other.false)
        assert verified.recall == other.true / other.objects
        assert verified.f1 == pytest.approx(other.f1(threshold), abs=1e-12)
        mine = Counted(e, threshold, first, labels)
        # No other threshold is better on the first half.
        best = max(mine.f1(score) for score, _ in mine.pairs)
        assert mine.f1(threshold) == pytest.approx(best, abs=1e-12)
        if on_choice is not None:
            assert (on_choice.true, on_choice.false) == (mine.true, mine.false)


def test_curves(evaluation: Evaluation) -> None:
    e = evaluation
    every = set(range(40))
    for label in range(3):
        curve = curve_of(e.marks, e.detections.score, label=label)
        ap50 = coco_eval(e.truth, e.detections).eval["precision"][0, :, label, 0, -1]
        np.testing.assert_allclose(precision_at_recalls(curve), ap50, rtol=0, atol=1e-12)
        assert e.class_ap50[label] == pytest.approx(100 * ap50.mean(), abs=1e-9)
        counted = Counted(e, 0.0, every, {label})
        grid = np.linspace(0, 1, 11)
        wanted = [counted.f1(x) for x in grid]
        np.testing.assert_allclose(f1_at(curve, grid), wanted, rtol=0, atol=1e-12)


def test_a_threshold_lies_between_two_scores() -> None:
    truth = made_truth(3)
    detections = made_detections(truth, 3)
    e = evaluate(truth, detections)
    curve = curve_of(e.marks, detections.score)
    threshold = best_threshold(curve)
    assert threshold is not None
    assert np.abs(curve.score - threshold).min() > 0
    nothing = operate(curve, 1.1)
    assert (nothing.true, nothing.false, nothing.precision, nothing.recall) == (0, 0, None, 0)


def test_calibration_of_each_bin(evaluation: Evaluation) -> None:
    e = evaluation
    for calibration, least in zip(e.calibration, (0.0, e.thresholds.chosen), strict=True):
        counted = Counted(e, 0.0, set(range(40)), {0, 1, 2})
        pairs = [(score, true) for score, true in counted.pairs if score >= least]
        total = 0.0
        for index in range(10):
            inside = [
                p for p in pairs if index / 10 <= p[0] < (index + 1) / 10 or p[0] == 1 == index
            ]
            assert calibration.count[index] == len(inside)
            if inside:
                score, true = np.mean([p[0] for p in inside]), np.mean([p[1] for p in inside])
                assert calibration.score[index] == pytest.approx(score, abs=1e-12)
                assert calibration.precision[index] == pytest.approx(true, abs=1e-12)
                total += len(inside) * abs(score - true)
        assert calibration.error == pytest.approx(total / len(pairs), abs=1e-12)


def test_calibration_errors_by_hand() -> None:
    """Four detections of 0.75, half of them true: the error is 0.25. None: it is not defined."""
    found = calibrate(np.full(4, 0.75), np.array([True, False, True, False]))
    assert found.error == 0.25
    assert np.isnan(calibrate(np.empty(0), np.empty(0, dtype=bool)).error)


def test_confusion_matrix(evaluation: Evaluation) -> None:
    e, truth, detections = evaluation, evaluation.truth, evaluation.detections
    wanted = np.zeros((4, 4), dtype=int)
    for image in range(40):
        objects = [int(g) for g in np.flatnonzero((truth.image == image) & ~truth.crowd)]
        crowds = [int(g) for g in np.flatnonzero((truth.image == image) & truth.crowd)]
        remaining = []
        mine = (detections.image == image) & (detections.score >= e.thresholds.chosen)
        for d in np.flatnonzero(mine).tolist():
            label, box = detections.label[d], detections.boxes[d]
            own = [g for g in objects if truth.label[g] == label]
            best = max(own, key=lambda g: iou(box, truth.boxes[g]), default=None)
            if best is not None and iou(box, truth.boxes[best]) >= 0.5:
                objects.remove(best)
                wanted[label, label] += 1
            elif not any(
                truth.label[g] == label and _inside(box, truth.boxes[g]) >= 0.5 for g in crowds
            ):
                remaining.append(d)
        for d in remaining:
            label, box = detections.label[d], detections.boxes[d]
            best = max(objects, key=lambda g: iou(box, truth.boxes[g]), default=None)
            if best is not None and iou(box, truth.boxes[best]) >= 0.5:
                objects.remove(best)
                wanted[truth.label[best], label] += 1
            else:
                wanted[3, label] += 1
        for g in objects:
            wanted[truth.label[g], 3] += 1
    assert (e.confusion == wanted).all()
    assert e.confusion[:3].sum() == (~truth.crowd).sum()
    assert np.diag(e.confusion)[:3].sum() > 10
    off = e.confusion[:3, :3] - np.diag(np.diag(e.confusion)[:3])
    assert off.sum() > 0


def _inside(box: np.ndarray, region: np.ndarray) -> float:
    """The share of a box that is in a region."""
    width = min(box[0] + box[2], region[0] + region[2]) - max(box[0], region[0])
    height = min(box[1] + box[3], region[1] + region[3]) - max(box[1], region[1])
    return float(max(width, 0) * max(height, 0) / (box[2] * box[3]))


def test_groups_of_images_are_data_sets(evaluation: Evaluation) -> None:
    e = evaluation
    number = np.bincount(e.truth.image[~e.truth.crowd], minlength=40)
    bounds = {"0": (0, 0), "1": (1, 1), "2 to 3": (2, 3), "4 to 7": (4, 7)}
    assert sum(group.images or 0 for group in e.crowding) == 40
    for group in e.crowding:
        low, high = bounds[group.name]
        images = np.flatnonzero((number >= low) & (number <= high)).tolist()
        assert (group.images, group.objects) == (len(images), int(number[images].sum()))
        counted = Counted(e, e.thresholds.chosen, set(images), {0, 1, 2})
        assert (group.operation.true, group.operation.false) == (counted.true, counted.false)
        if low:
            stats = 100 * coco_eval(e.truth, e.detections, images).stats
            assert group.ap == pytest.approx(tuple(stats[:2]), abs=1e-9)


def test_groups_of_sizes(evaluation: Evaluation) -> None:
    e = evaluation
    stats = 100 * coco_eval(e.truth, e.detections).stats
    assert [group.name for group in e.sizes] == ["small", "medium", "large"]
    for group, ap in zip(e.sizes, stats[3:6], strict=True):
        assert group.ap[0] == pytest.approx(ap, abs=1e-9)
        assert group.operation.true + group.operation.missed == group.objects
    kept = ~e.truth.crowd
    assert e.sizes[0].objects == (e.truth.area[kept] <= 32**2).sum()
