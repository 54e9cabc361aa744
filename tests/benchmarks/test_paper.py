from pathlib import Path

import pytest

from benchmarks.paper import paper_row
from benchmarks.spec import BenchSpec, make_weights
from tests.helpers import ROOT
from tests.small_shapes import small_shapes

CONFIG = str(ROOT / "configs/shapes/miti_detr.yaml")


@pytest.fixture
def spec(tmp_path: Path) -> BenchSpec:
    """Trained into a folder of its own, which has no weights yet."""
    words = ("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"))
    return BenchSpec(CONFIG, words, sizes=((64, 96),))


def test_without_weights_there_are_parameters_alone(spec: BenchSpec, tmp_path: Path) -> None:
    row = paper_row(spec)
    assert (row.name, row.seconds, row.ap, row.images) == ("miti_detr", None, None, 0)
    assert row.parameters > 100_000
    assert row.note == f"no weights: neither {tmp_path}/run/model_final.pth nor MODEL.WEIGHTS"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_weights_of_the_run_are_evaluated(
    spec: BenchSpec, tmp_path: Path, precision: str
) -> None:
    make_weights(spec, str(tmp_path / "run/model_final.pth"))
    changed = BenchSpec(CONFIG, spec.overrides, precision=precision)
    with small_shapes(tmp_path):
        row = paper_row(changed)
    assert row.images == 4
    assert row.seconds is not None
    assert row.seconds > 0
    assert row.ap is not None
    assert 0 <= row.ap < 20  # random weights
    assert row.note == str(tmp_path / "run/model_final.pth")
    assert not (tmp_path / "run/inference").exists()  # that of the run is left alone


def test_data_that_are_not_here_are_named(spec: BenchSpec, tmp_path: Path) -> None:
    path = str(tmp_path / "other.pth")
    make_weights(spec, path)
    words = (*spec.overrides, "MODEL.WEIGHTS", path, "DATASETS.TEST", "('nowhere_val',)")
    row = paper_row(BenchSpec(CONFIG, words))
    assert row.seconds is row.ap is None
    assert row.note.startswith("no data: ")
    assert "nowhere_val" in row.note
