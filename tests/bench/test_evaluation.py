"""Timed evaluations and counts of parameters."""

from pathlib import Path

import pytest
from detectron2.modeling import build_model

from miti_detr.bench.evaluation import count_parameters, time_evaluation
from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine import setup_config
from tests.helpers import ROOT, build_on_meta
from tests.small_shapes import small_shapes

CONFIG = str(ROOT / "configs/shapes/miti_detr.yaml")


@pytest.fixture
def overrides(tmp_path: Path) -> tuple[str, ...]:
    """The output folder is new and has no weights."""
    small = ("MODEL.DETR.ENC_LAYERS", "1", "MODEL.DETR.DEC_LAYERS", "1")
    return ("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "run"), *small)


def save_weights(overrides: tuple[str, ...], folder: Path) -> Path:
    cfg = setup_config(CONFIG, overrides)
    MitiDetrCheckpointer(build_model(cfg), str(folder), cfg=cfg).save("model_final")
    return folder / "model_final.pth"


def test_without_weights_only_parameters_are_counted(
    overrides: tuple[str, ...], tmp_path: Path
) -> None:
    found = time_evaluation(CONFIG, overrides)
    assert (found.name, found.seconds, found.ap, found.images) == ("miti_detr", None, None, 0)
    assert found.parameters > 100_000
    assert found.note.startswith(f"no weights: neither {tmp_path}/run/model_final.pth nor ")


@pytest.mark.slow
def test_the_weights_of_the_run_are_evaluated(overrides: tuple[str, ...], tmp_path: Path) -> None:
    path = save_weights(overrides, tmp_path / "run")
    before = sorted((tmp_path / "run").iterdir())
    with small_shapes(tmp_path):
        found = time_evaluation(CONFIG, overrides, precision="bfloat16")
    assert found.images == 4
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.ap is not None
    assert 0 <= found.ap < 20  # random weights
    assert found.note == str(path)
    assert sorted((tmp_path / "run").iterdir()) == before  # no evaluation in the folder of the run


def test_missing_data_are_named(overrides: tuple[str, ...], tmp_path: Path) -> None:
    path = save_weights(overrides, tmp_path / "other")
    words = ("MODEL.WEIGHTS", str(path), "DATASETS.TEST", "('nowhere_val',)")
    found = time_evaluation(CONFIG, (*overrides, *words))
    assert found.seconds is found.ap is None
    assert found.note.startswith("no data: ")
    assert "nowhere_val" in found.note


@pytest.mark.slow
def test_the_published_number_of_parameters() -> None:
    """The number in the paper is that of 91 classes."""
    config = str(ROOT / "configs/coco/miti_detr_R50.yaml")
    for classes, number in ((80, 41_299_541), (91, 41_302_368)):
        cfg = setup_config(config, ("MODEL.DETR.NUM_CLASSES", str(classes)))
        found = count_parameters(build_on_meta(cfg))
        assert found["trainable"] == number
        # Stem and res2, which are frozen: convolutions of 64 and 256 channels
        assert found["parameters"] - number == 222_400
