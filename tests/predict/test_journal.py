import json
import multiprocessing
from pathlib import Path

import pytest

from miti_detr.predict.journal import Journal

SETTINGS = {"threshold": 0.5, "classes": ("a",)}


def test_entries_survive(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, SETTINGS) as journal:
        journal.add([{"file": "a", "n": 1}, {"file": "ä\n", "n": 2}])
        journal.add([{"file": "b", "error": "no"}])
        assert journal.entry("a")["n"] == 1
    with Journal(path, SETTINGS) as journal:
        assert "a" in journal
        assert "ä\n" in journal
        assert "b" not in journal  # it failed, and is tried again
        assert "c" not in journal
        journal.add([{"file": "b", "n": 3}])
        assert "b" in journal
        assert [journal.entry(file)["n"] for file in ("a", "ä\n", "b")] == [1, 2, 3]
        journal.remove()
    assert not path.exists()


@pytest.mark.parametrize("kept", [0, 5, 60, 90, 110])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "j"
    with Journal(path, SETTINGS) as journal:
        journal.add([{"file": f"{index}", "text": "x" * 20} for index in range(3)])
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    lines = whole[:kept].count(b"\n")
    with Journal(path, SETTINGS) as journal:
        done = [f"{index}" in journal for index in range(3)]
        assert done == [index < lines - 1 for index in range(3)]
        journal.add([{"file": "2", "text": "new"}])
        assert journal.entry("2")["text"] == "new"
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, SETTINGS):
        pass
    with pytest.raises(
        ValueError, match=r"unfinished job with threshold 0\.5, not 0\.6\. .*delete"
    ):
        Journal(path, {**SETTINGS, "threshold": 0.6})


def open_journal(path: Path) -> None:
    with pytest.raises(BlockingIOError, match="another process predicts into"):
        Journal(path, SETTINGS)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", SETTINGS):
        other = multiprocessing.get_context("fork").Process(
            target=open_journal, args=(tmp_path / "j",)
        )
        other.start()
        other.join()
    assert other.exitcode == 0
