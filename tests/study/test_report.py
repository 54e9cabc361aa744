"""The report is self-contained, agrees with its JSON, and is readable in a browser."""

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from miti_detr.report.page import cell_text
from miti_detr.study.comparison import compare_runs
from miti_detr.study.report import write_report
from tests.browser import BROWSER, check_page
from tests.study.made_runs import write_detections, write_foreign_run, write_run
from tests.visualize.test_detections import register_images

TRUE_BOX = [50.0, 10, 45, 35]  # of register_images, of category 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two arms with two seeds; the second arm has one false detection on image 1 and
    two on image 2."""
    root = tmp_path_factory.mktemp("report")
    dataset = register_images(root, 3)
    paths = []
    for arm, aps in (("detr_with_a_rather_long_name", [10, 20]), ("miti", [12, 23])):
        for seed in (0, 1):
            path = root / arm / f"seed_{seed}"
            write_run(path, aps, seed=seed, residual=arm, dataset=dataset, rank=0.123)
            boxes: list[Any] = [(image, TRUE_BOX, 0.9) for image in range(3)]
            if arm == "miti":
                boxes += [(1, [0, 0, 20, 20], 0.8), (2, [0, 0, 20, 20], 0.6)]
                boxes += [(2, [0, 25, 20, 20], 0.7), (0, [0, 0, 9, 9], 0.4)]
            write_detections(path, dataset, boxes)
            paths.append(path)
    write_report(compare_runs(paths), root / "out", command="miti-detr compare", images=2)
    return root / "out"


@pytest.mark.slow
def test_all_numbers_of_the_json_are_in_the_html(folder: Path) -> None:
    content = json.loads((folder / "report.json").read_text())
    page = html.unescape((folder / "report.html").read_text())
    cells = re.findall(r'<td data-label="[^"]*">([^<]*)</td>', page)
    tables = [
        *(t for s in content["sections"] for t in s["tables"]),
        content["published"],
        content["runs"],
    ]
    expected = [cell_text(cell, t["digits"]) for t in tables for row in t["rows"] for cell in row]
    assert cells == expected
    assert {t["key"] for t in tables} == {
        *("accuracy", "differences", "efficiency", "reached", "stability", "matching", "queries"),
        *("rank", "published", "runs", "claims"),
    }


def test_the_csv_has_the_numbers_of_the_json(folder: Path) -> None:
    rows = list(csv.DictReader((folder / "report.csv").open()))
    (row,) = [r for r in rows if r["table"] == "differences" and r["column"] == "AP"]
    assert (float(row["value"]), float(row["low"]), row["n"]) == (3, 3, "2")
    assert len([r for r in rows if r["table"] == "runs" and r["column"] == "AP"]) == 4


def test_the_page_needs_nothing_else(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    targets = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?([^"')\s>]{0,40})""", page)
    assert targets
    assert all(target.startswith("data:") for target in targets), targets
    assert "<script" not in page
    pictures = list((folder / "figures").rglob("*.*"))
    assert len([t for t in targets if t.startswith("data:image")]) == len(pictures)
    assert {path.stem for path in pictures if path.suffix == ".png"} == {
        *("loss", "error", "recall", "difference", "final", "gradient", "matching"),
        *("rank_encoder_residual", "rank_encoder_residual_training"),
        *("rank_encoder_effective_rank", "rank_encoder_effective_rank_training"),
    }


def test_images_that_differ_most_come_first(folder: Path) -> None:
    """Detections below the threshold and crowds are ignored."""
    content = json.loads((folder / "report.json").read_text())
    assert [p["image"] for p in content["pictures"]] == ["2.png", "1.png"]
    assert content["pictures"][0]["errors"] == {
        "detr_with_a_rather_long_name": [0, 0],
        "miti": [0, 2],
    }
    assert content["threshold"] == 0.5


@pytest.mark.slow
def test_foreign_runs_have_a_report_too(tmp_path: Path) -> None:
    comparison = compare_runs([write_foreign_run(tmp_path / "theirs")])
    report = write_report(comparison, tmp_path / "out", command="", studied=False)
    page = report.read_text()
    assert "theirs lacks bbox/AR (AR@100), config.yaml." in page
    assert "Figure 4 is left out: the test set (unknown) is not registered." in page
    assert "30.50" in page
    assert "same augmentation" not in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_desktop_and_phone(folder: Path, width: int) -> None:
    check_page(folder / "report.html", width)
