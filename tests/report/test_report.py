"""The page is self-contained, agrees with its JSON and the evaluation, and fits a phone."""

import csv
import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miti_detr.report.arrays import Detections, Truth, sort_detections
from miti_detr.report.bootstrap import resample
from miti_detr.report.evaluation import Evaluation
from miti_detr.report.page import cell_text
from miti_detr.report.report import ReportOptions, write_report
from tests.browser import BROWSER, check_page
from tests.report.made import coco_eval, iou, made_detections, made_truth

RESAMPLES = 20


def read(path: str) -> Image.Image:
    return Image.new("RGB", (400, 400), "gray")


def write(truth: Truth, detections: Detections, folder: Path, **options: Any) -> Evaluation:
    given = ReportOptions("model on data", resamples=RESAMPLES, pictures=3)
    return write_report(truth, detections, folder, given, read=read, **options)


class Made:
    """A report of one model against another."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.truth = folder, made_truth(0)
        names = ["a class with a rather long name", "<b>&", "c"]
        self.truth = dataclasses.replace(self.truth, class_names=names)
        self.detections, self.other = (made_detections(self.truth, seed) for seed in (1, 2))
        self.evaluation = write(self.truth, self.detections, folder, other=self.other)
        self.content = json.loads((folder / "report.json").read_text())
        self.page = (folder / "report.html").read_text()
        self.tables = {t["key"]: t for s in self.content["sections"] for t in s["tables"]}

    def value(self, key: str, row: str) -> float:
        """The first number of a row, without its interval."""
        cell = self.rows(key)[row][0]
        return float(cell["mean"] if isinstance(cell, dict) else cell)

    def rows(self, key: str) -> dict[str, list[Any]]:
        return {row[0]: row[1:] for row in self.tables[key]["rows"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("report"))


@pytest.mark.slow
def test_all_numbers_of_the_json_are_in_the_html(made: Made) -> None:
    page = html.unescape(made.page)
    cells = re.findall(r'<td data-label="[^"]*">(.*?)</td>', page)
    tables = made.tables.values()
    assert cells == [cell_text(c, t["digits"]) for t in tables for row in t["rows"] for c in row]
    counts = re.findall(r'<td style="[^"]*">([\d,]+)</td>', page)
    assert counts == [f"{c:,}" for row in made.content["confusion"]["counts"] for c in row]
    assert f"at least {made.content['threshold']:.3f}" in page
    for picture in made.content["worst"]:
        assert f"{picture['image']}: {picture['missed']} missed, {picture['false']} false" in page


def test_tables_have_the_numbers_of_the_evaluation(made: Made) -> None:
    e = made.evaluation
    stats = coco_eval(made.truth, made.detections).stats
    values = [made.value("coco", name) for name in made.rows("coco")]
    assert values == pytest.approx(100 * stats, abs=1e-9)
    samples = resample([e.counter], len(made.truth.files), resamples=RESAMPLES, seed=0)[0]
    cell = made.rows("coco")["AP"][0]
    assert [cell["low"], cell["high"]] == np.percentile(samples.ap, [2.5, 97.5]).tolist()
    for label, name in enumerate(made.truth.class_names):
        row, best = made.rows("classes")[name], e.thresholds.classes[label]
        assert best is not None
        assert row[0] == ((made.truth.label == label) & ~made.truth.crowd).sum()
        assert row[1]["mean"] == e.class_ap[label]
        assert row[2:4] == [e.class_ap50[label], e.class_ar[label]]
        assert row[4] == f"{made.content['class_thresholds'][name]:.3f}" == f"{best.threshold:.3f}"
        assert row[5:] == pytest.approx(
            [100 * (x or 0) for x in (best.precision, best.recall, best.f1)]
        )
    verified = made.rows("threshold")["chosen, verified"]
    assert verified[2:5] == [getattr(e.thresholds.verified, n) for n in ("true", "false", "missed")]
    false, missed = e.false_and_missed()
    errors = made.rows("errors")
    assert (
        sum(
            errors[k][1]
            for k in errors
            if k in ("class", "localisation", "both", "duplicate", "background")
        )
        == false.sum()
    )
    assert missed.sum() == np.array(made.content["confusion"]["counts"])[:3].sum() - sum(
        made.content["confusion"]["counts"][k][k] for k in range(3)
    )
    assert made.content["calibration_error"][0] == e.calibration[0].error
    assert f"is {100 * e.calibration[0].error:.2f} %" in made.page


def test_the_difference_of_two_models(made: Made) -> None:
    aps = [100 * coco_eval(made.truth, d).stats[0] for d in (made.detections, made.other)]
    first, second, cell = made.rows("difference")["AP"]
    assert [first, second] == pytest.approx(aps, abs=1e-9)
    assert cell["mean"] == pytest.approx(aps[0] - aps[1], abs=1e-9)
    assert cell["low"] < cell["high"]
    assert cell["n"] == RESAMPLES


def test_curves_of_the_json(made: Made) -> None:
    curves = made.content["curves"]
    mean = np.mean([curves["precision"][name] for name in made.truth.class_names])
    assert 100 * mean == pytest.approx(made.value("coco", "AP50"), abs=1e-9)
    assert np.mean(curves["precision"]["all classes"]) == pytest.approx(mean, abs=1e-12)
    assert len(curves["f1"]["all classes"]) == 101


def test_the_worst_images_come_first(made: Made) -> None:
    """Errors counted again: detections and objects without a partner of their class."""
    e, truth, detections = made.evaluation, made.truth, made.detections
    wanted = {}
    for image, file in enumerate(truth.files):
        objects = np.flatnonzero((truth.image == image) & ~truth.crowd).tolist()
        kept = (detections.image == image) & (detections.score >= e.thresholds.chosen)
        kept &= ~e.matches.ignored[0]
        false = 0
        for d in np.flatnonzero(kept).tolist():
            own = [g for g in objects if truth.label[g] == detections.label[d]]
            best = max(own, key=lambda g: iou(detections.boxes[d], truth.boxes[g]), default=None)
            if best is not None and iou(detections.boxes[d], truth.boxes[best]) >= 0.5:
                objects.remove(best)
            else:
                false += 1
        wanted[file] = (len(objects), false)
    found = [(p["image"], p["missed"], p["false"]) for p in made.content["worst"]]
    assert len(found) == 3
    for file, missed, false in found:
        assert wanted[file] == (missed, false)
    totals = sorted((sum(pair) for pair in wanted.values()), reverse=True)
    assert [missed + false for _, missed, false in found] == totals[:3]


def test_the_csv_has_the_numbers_of_the_json(made: Made) -> None:
    rows = list(csv.DictReader((made.folder / "report.csv").open()))
    cells = {(r["table"], r["row"], r["column"]): r["value"] for r in rows}
    assert float(cells["coco", "AP", "value [95 % interval]"]) == made.value("coco", "AP")
    assert float(cells["thresholds", "all classes", "threshold"]) == made.content["threshold"]
    assert int(cells["confusion", "c", "c"]) == made.content["confusion"]["counts"][2][2]
    (row,) = [
        r
        for r in rows
        if r["table"] == "difference" and r["column"].startswith("diff") and r["row"] == "AP"
    ]
    assert float(row["low"]) == made.rows("difference")["AP"][2]["low"]


def test_the_page_needs_nothing_else(made: Made) -> None:
    targets = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?([^"')\s>]{0,40})""", made.page)
    assert len([target for target in targets if target.startswith("data:image")]) == 3 + 2 * 3
    assert all(target.startswith(("data:", "#image-")) for target in targets)
    for target in targets:
        if target.startswith("#"):
            assert f'id="{target[1:]}"' in made.page
    assert "<script" not in made.page
    assert "<b>&</b>" not in made.page


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.slow
def test_the_page_fits_desktop_and_phone(made: Made, width: int) -> None:
    check_page(made.folder / "report.html", width)


@pytest.mark.slow
def test_a_model_that_finds_nothing_or_everything(tmp_path: Path) -> None:
    truth = made_truth(0, images=5, crowds=0.0)
    nothing = sort_detections(np.empty(0), np.empty(0), np.empty((0, 4)), np.empty(0))
    evaluation = write(truth, nothing, tmp_path / "nothing")
    assert evaluation.coco["AP"] == 0
    assert evaluation.errors[0].counts()["missed"] == len(truth.image)
    assert "NaN" not in (tmp_path / "nothing" / "report.json").read_text()
    score = np.ones(len(truth.image))
    perfect = sort_detections(truth.image, truth.label, truth.boxes, score)
    evaluation = write(truth, perfect, tmp_path / "perfect")
    assert evaluation.coco["AP"] == pytest.approx(100)
    assert json.loads((tmp_path / "perfect" / "report.json").read_text())["worst"] == []
    assert "most errors" not in (tmp_path / "perfect" / "report.html").read_text()
