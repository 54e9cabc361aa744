from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import bench_evaluation, bench_loader
from benchmarks.spec import BenchSpec, make_weights
from tests.helpers import ROOT
from tests.small_shapes import small_shapes

WORDS = ("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "4", "MODEL.DETR.DEC_LAYERS", "1")


def shapes_spec(*overrides: str) -> BenchSpec:
    return BenchSpec(
        str(ROOT / "configs/shapes/miti_detr.yaml"), (*WORDS, *overrides), sizes=((64, 96),)
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("weights") / "model.pth")
    make_weights(shapes_spec(), path)
    return path


@pytest.mark.slow
def test_the_configs_own_loader(weights: str, tmp_path: Path) -> None:
    with small_shapes(tmp_path):
        found = bench_loader(shapes_spec(), weights, images=47)
    assert (found["batch"], found["workers"]) == (4, 0)
    assert len(found["loader_seconds"]) == 12  # 48 images
    assert len(found["step_seconds"]) == 10  # on the last of them
    assert min(found["loader_seconds"] + found["step_seconds"]) > 0


@pytest.mark.parametrize("name", ["nowhere_train", "coco_2017_train"])
def test_data_that_are_not_here_are_named(
    weights: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = bench_loader(shapes_spec("DATASETS.TRAIN", f"('{name}',)"), weights)
    assert list(found) == ["missing"]
    assert found["missing"].startswith(f"{name}: ")


@pytest.mark.slow
def test_statistics_of_both_evaluators_are_equal() -> None:
    pytest.importorskip("faster_coco_eval")
    found: dict[str, Any] = bench_evaluation(30)
    assert found["images"] == 30
    assert found["max_difference"] <= 1e-12
    assert 0.01 < found["AP"] < 0.5  # neither nothing nor all is found
    for label in ("ours", "detectron2"):
        assert 0 < found[label]["metrics"] < found[label]["seconds"]


def test_without_the_fast_evaluator_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miti_detr.evaluation.coco._fast_class", lambda: None)
    with pytest.raises(ImportError, match=r"pip install miti_detr\[fast-eval\]"):
        bench_evaluation(2)
