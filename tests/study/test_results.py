"""Damaged records of a run give one line that names the file."""

from pathlib import Path

import pytest

from miti_detr.study.results import read_result
from tests.study.made_runs import write_run


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", b""),
        ("metrics.json", b"\x00\xff\x80"),
        ("metrics.json", b"[]\n5\n{}\n"),
        ("metrics.json", b'{"iteration": true}\n{"iteration": "1"}\n{"iteration": -1}'),
        ("config.yaml", b"a: [\n"),
        ("config.yaml", b"- a"),
        ("config.yaml", b""),
        ("config.yaml", b"A: !!python/object/apply:os.getcwd []"),
        ("start.json", b"{"),
        ("start.json", b"[]"),
        ("start.json", b'{"parameters": "many"}'),
        ("evaluation.json", b'{"seconds": "1"}'),
        ("finished.json", b"\xff"),
        ("finished.json", b'{"error": 5}'),
        ("steps.json", b'{"iteration": 1, "total_loss": "a"}\n'),
        ("matches.json", b'{"iteration": 1}\n'),
        ("matches.json", b'{"iteration": 1, "num_queries": 2, "queries": [[0], [1, 2]]}\n'),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    path = write_run(tmp_path / "run", [10, 20])
    (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as error:
        read_result(path)
    assert "\n" not in str(error.value)


def test_lines_that_a_kill_cut_short_are_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [10, 20])
    for file in ("metrics.json", "steps.json", "matches.json"):
        with (path / file).open("a") as lines:
            lines.write('{"iteration": 5')
    result = read_result(path)
    assert result.final("AP") == 20
    assert len(result.steps) == 200
    assert len(result.matches) == 2


def test_a_seed_or_limit_of_another_type(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [10, 20])
    (path / "config.yaml").write_text("SEED: none\nSOLVER: {CLIP_GRADIENTS: {CLIP_VALUE: a}}")
    assert read_result(path).seed is None
