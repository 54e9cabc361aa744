"""The tables of the pages are those of the records in docs/studies."""

import json
import re
from pathlib import Path

import pytest

import tools.study
from miti_detr.study.study_file import read_study
from tools.study import PAGES, RECORDS, ROOT, fill, make_record

from .made_runs import write_run

LOG = "miti_detr 0.1.0, git commit 12\nPython  3.11\ndetectron2  0.6 @/x\nPyTorch  2.4 @/y\n"

RECORD = {
    "arms": {
        "detr": {"seeds": {"0": {"AP": 1.0, "effective rank": 2.0}, "1": {"AP": 3.0}}},
        "miti": {
            "choice": {"key": "SOLVER.BASE_LR", "value": 0.0005},
            "seeds": {"0": {"AP": 5.0}},
            "reference": "detr",
            "difference": {"mean": -1.25, "low": -2.0, "high": 0.5},
            "p": 0.012,
            "verdict": "lower",
        },
    }
}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.study, "RECORDS", tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(RECORD))


@pytest.mark.usefixtures("record")
def test_a_table_between_marks_is_replaced() -> None:
    page = "a\n<!-- study small: AP rank difference verdict choice -->\nold\n<!-- end -->\nb\n"
    filled = fill(page)
    assert fill(filled) == filled
    assert filled.splitlines()[2:6] == [
        "| model | SOLVER.BASE_LR | AP | effective rank | AP minus the reference's | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `detr` |  | 2.0 ± 1.4 | 2.0 |  |  |",
        "| `miti` | 0.0005 | 5.0 |  | \u22121.2 (\u22122.0 to 0.5) vs `detr` | lower (p 0.012) |",
    ]
    assert filled.startswith("a\n<!-- study small:")
    assert filled.endswith("<!-- end -->\nb\n")


@pytest.mark.usefixtures("record")
def test_a_mark_that_no_record_has() -> None:
    with pytest.raises(ValueError, match=r"no column 'mAP'\. Choose from choice, AP"):
        fill("<!-- study small: mAP -->\n<!-- end -->")
    with pytest.raises(FileNotFoundError, match="other"):
        fill("<!-- study other -->\n<!-- end -->")


def test_a_run_that_diverged_at_once_is_missing(tmp_path: Path) -> None:
    study = read_study(ROOT / "configs/studies/learning_rates.yaml")
    for arm in study.arms:
        for seed in arm.seeds:
            run = write_run(tmp_path / arm.name / f"seed_{seed}", [1, 2 + seed], seed=seed)
            (run / "log.txt").write_text(LOG)
            metrics = (run / "metrics.json").read_text().replace('"lr"', '"time": 36.0, "lr"')
            (run / "metrics.json").write_text(metrics)
    (tmp_path / "detr_6/seed_2/metrics.json").unlink()
    (tmp_path / "detr_6/seed_2/finished.json").write_text('{"error": "the loss is NaN"}')
    record = make_record("learning_rates", tmp_path, "a machine")
    assert record["missing"] == ["detr_6/seed_2 stopped early: the loss is NaN"]
    assert (record["runs"], record["machine_hours"]) == (12, 22.0)  # 11 runs of 200 iterations
    assert list(record["arms"]["detr_6"]["seeds"]) == ["1", "3"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_of_the_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text, "run `python -m tools.study`"


def test_every_record_stands_in_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = set(re.findall(r"<!-- study (\w+)", pages))
    assert {path.stem for path in RECORDS.glob("*.json")} == shown
