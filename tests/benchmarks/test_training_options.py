from pathlib import Path

import pytest

from benchmarks.training_options import EVALUATION, TRAINING, prepare, table
from benchmarks.worker import Alternation
from tests.helpers import tiny_config


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRAINING, *EVALUATION])
def test_every_variant_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_config("MODEL.DEVICE", "cpu").dump())
    _, step = prepare(name, str(tmp_path / "tiny.yaml"), 2, 2, (48, 64))
    assert step()["step"] > 0
    assert step()["step"] > 0


def test_table_is_over_the_first_variant() -> None:
    seconds = {"training": {"step": [1.0, 2.0, 1.0]}, "EMA": {"step": [1.1, 2.1, 1.2]}}
    marks = {"peak": 900.0, "added": 100.0, "device_peak": 0.0}
    memory = {"training": marks, "EMA": {**marks, "added": 150.0}}
    lines = table([Alternation({}, seconds, memory)]).splitlines()
    assert lines[2].split() == ["training", "1,000", "1.000x", "900", "1.00x"]
    assert lines[3].split() == ["EMA", "1,200", "1.100x", "900", "1.50x"]
