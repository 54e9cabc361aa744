"""Kinds of errors against loops over images, and a detector whose faults are known."""

import numpy as np
import pytest

from miti_detr.report.arrays import Detections, Truth, sort_detections
from miti_detr.report.errors import FALSE_KINDS, KINDS, NO_ERROR
from miti_detr.report.evaluation import evaluate
from tests.report.made import coco_eval, iou, made_detections, made_truth


class Loops:
    """TIDE as its paper describes it: one image, one detection, one object at a time."""

    def __init__(self, truth: Truth, detections: Detections) -> None:
        self.truth, self.detections = truth, detections
        self.kind = [""] * len(detections.score)
        self.target = [-1] * len(detections.score)
        self.true = [False] * len(detections.score)
        self.found: set[int] = set()
        for image in range(len(truth.files)):
            objects = np.flatnonzero((truth.image == image) & ~truth.crowd).tolist()
            mine = np.flatnonzero(detections.image == image).tolist()  # by decreasing score
            for d in mine:
                free = [
                    g
                    for g in objects
                    if g not in self.found and truth.label[g] == detections.label[d]
                ]
                best = max(free, key=lambda g: self.iou(d, g), default=None)
                if best is not None and self.iou(d, best) >= 0.5:
                    self.true[d] = True
                    self.found.add(best)
            for d in mine:
                if not self.true[d]:
                    self.kind[d], self.target[d] = self.classify(d, objects)
        usable = set(self.target)
        everything = np.flatnonzero(~truth.crowd).tolist()
        self.missed = [g for g in everything if g not in self.found and g not in usable]

    def iou(self, detection: int, index: int) -> float:
        return iou(self.detections.boxes[detection], self.truth.boxes[index])

    def classify(self, d: int, objects: list[int]) -> tuple[str, int]:
        label = self.detections.label[d]
        own = [g for g in objects if self.truth.label[g] == label]
        other = [g for g in objects if self.truth.label[g] != label]
        best = max(own, key=lambda g: self.iou(d, g), default=-1)
        if own and 0.1 <= self.iou(d, best) <= 0.5:
            return "localisation", best
        best = max(other, key=lambda g: self.iou(d, g), default=-1)
        if other and self.iou(d, best) >= 0.5:
            return "class", best
        if any(self.iou(d, g) >= 0.5 for g in own if g in self.found):
            return "duplicate", -1
        if all(self.iou(d, g) <= 0.1 for g in objects):
            return "background", -1
        return "both", -1

    def cost(self, kind: str) -> float:
        """AP50 by pycocotools' rule after the correction, minus that before it."""
        points = [
            (self.detections.label[d], self.detections.score[d], self.true[d])
            for d in range(len(self.true))
            if self.kind[d] != kind
        ]
        chosen: dict[int, int] = {}
        for d, target in enumerate(self.target):  # the first has the highest score
            if target >= 0 and target not in self.found:
                chosen.setdefault(target, d)
        for target, d in chosen.items():
            if self.kind[d] == kind:
                points.append((self.truth.label[target], self.detections.score[d], True))
        objects = self.truth.label[~self.truth.crowd].tolist()
        fewer = list(objects)
        for g in self.missed if kind == "missed" else ():
            fewer.remove(self.truth.label[g])
        if kind == "false positives":
            points = [point for point in points if point[2]]
        if kind == "false negatives":
            fewer = [self.truth.label[g] for g in self.found]
        before = [
            (self.detections.label[d], self.detections.score[d], self.true[d])
            for d in range(len(self.true))
        ]
        value = self.ap(points, fewer, set(objects)) - self.ap(before, objects, set(objects))
        return max(100 * value, 0.0)

    @staticmethod
    def ap(points: list[tuple[int, float, bool]], objects: list[int], labels: set[int]) -> float:
        values = []
        for label in labels:
            mine = sorted((p for p in points if p[0] == label), key=lambda p: -p[1])
            number, true = objects.count(label), 0
            curve = []
            for place, point in enumerate(mine, start=1):
                true += point[2]
                curve.append((true / max(number, 1), true / place))
            recalls = np.linspace(0, 1, 101)
            best = [max((p for r, p in curve if r >= x), default=0) for x in recalls]
            values.append(sum(best) / 101 if number else 0)
        return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(3))
def test_kinds_and_costs_are_those_of_loops(seed: int) -> None:
    truth = made_truth(seed, images=15, crowds=0.0)
    detections = made_detections(truth, seed, noise=4)
    evaluation = evaluate(truth, detections)
    loops = Loops(truth, detections)
    found = [FALSE_KINDS[k] if k != NO_ERROR else "" for k in evaluation.errors[0].kind]
    assert found == loops.kind
    assert set(FALSE_KINDS) <= set(found)
    assert np.flatnonzero(evaluation.errors[0].missed).tolist() == loops.missed
    for name in (*KINDS, "false positives", "false negatives"):
        assert evaluation.costs[name] == pytest.approx(loops.cost(name), abs=1e-9), name


def test_detections_in_crowds_are_no_errors() -> None:
    truth = made_truth(0, crowds=0.5)
    detections = made_detections(truth, 0)
    errors = evaluate(truth, detections).errors[0]
    evaluation = coco_eval(truth, detections)
    ignored = sum(
        image["dtIgnore"][0].sum()
        for image in evaluation.evalImgs[: len(truth.class_names) * 4 * len(truth.files)]
        if image is not None and image["aRng"] == [0, 1e10]
    )
    true = evaluate(truth, detections).marks.true[0].sum()
    assert (errors.kind == NO_ERROR).sum() == true + ignored
    assert ignored > 3


def faulty_detector(truth: Truth, seed: int) -> Detections:
    """Each object is found; 20 % twice, 10 % as another class, and 15 % with a box that is moved
    by 0.3 of its sides, which is an IoU of 0.49 / 1.51; 5 % are not found at all."""
    rng = np.random.default_rng(seed)
    count = len(truth.image)
    fault = rng.permutation(count)
    share = (np.array([0.2, 0.3, 0.45, 0.5]) * count).round().astype(int)
    twice, flipped, moved, left_out = np.split(fault[: share[3]], share[:3])
    label, boxes = truth.label.copy(), truth.boxes.copy()
    label[flipped] = (label[flipped] + 1) % len(truth.class_names)
    boxes[moved, :2] += 0.3 * boxes[moved, 2:]
    kept = np.setdiff1d(np.arange(count), left_out)
    kept = np.concatenate([kept, twice])
    score = rng.uniform(0.6, 1, len(kept))
    score[-len(twice) :] -= 0.5  # of duplicates
    return sort_detections(truth.image[kept], label[kept], boxes[kept], score)


def grid_truth(images: int) -> Truth:
    """Nine objects an image that do not overlap, also if they move by 0.3 of their sides."""
    places = np.stack(np.meshgrid(np.arange(3), np.arange(3)), -1).reshape(-1, 2) * 130.0
    boxes = np.concatenate([places, np.full((9, 2), 80.0)], axis=1)
    count = 9 * images
    return Truth(
        class_names=["a", "b", "c"],
        files=[f"{index}.png" for index in range(images)],
        sizes=np.full((images, 2), 400),
        image=np.repeat(np.arange(images), 9),
        label=np.arange(count) % 3,
        boxes=np.tile(boxes, (images, 1)),
        area=np.full(count, 6400.0),
        crowd=np.zeros(count, dtype=bool),
    )


def test_known_faults_are_diagnosed() -> None:
    """Of 1,800 objects: 360 duplicates, 180 flips, 270 moved boxes, 90 missed."""
    truth = grid_truth(200)
    evaluation = evaluate(truth, faulty_detector(truth, 0))
    assert evaluation.errors[0].counts() == {
        "duplicate": 360,
        "class": 180,
        "localisation": 270,
        "both": 0,
        "background": 0,
        "missed": 90,
    }
    # 75 % are found; each correction adds its share, but duplicates come last and cost nothing.
    costs = evaluation.costs
    assert costs["class"] > 5
    assert costs["localisation"] > costs["class"]
    assert costs["duplicate"] < 1
    assert costs["both"] == costs["background"] == 0
