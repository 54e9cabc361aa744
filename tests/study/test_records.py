"""The tables of the pages are those of the records in docs/studies."""

import json
import re
from pathlib import Path

import pytest

import tools.study
from tools.study import PAGES, RECORDS, fill

RECORD = {
    "arms": {
        "detr": {"seeds": {"0": {"AP": 1.0, "effective rank": 2.0}, "1": {"AP": 3.0}}},
        "miti": {
            "choice": {"value": 0.0005},
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
        "| model | chosen | AP | effective rank | AP minus the reference's | verdict |",
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_of_the_records(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text, "run `python -m tools.study`"


def test_every_record_stands_in_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    shown = set(re.findall(r"<!-- study (\w+)", pages))
    assert {path.stem for path in RECORDS.glob("*.json")} == shown
