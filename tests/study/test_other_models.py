"""Detectron2's own models as arms of a study, and in ``train_net.py``."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

import train_net
from miti_detr.data import check_datasets
from miti_detr.engine import Trainer, setup_config
from miti_detr.engine.solver.plan import doubts
from miti_detr.study.comparison import compare_study
from miti_detr.study.plan import Arm, Study, plan_runs
from miti_detr.study.report import write_report
from miti_detr.study.runs import time_evaluations
from miti_detr.study.study_file import read_study
from tests.helpers import ROOT
from tests.small_shapes import small_shapes
from tests.study.test_plan import DETR, WORDS, train

FASTER_RCNN = str(ROOT / "configs/studies/faster_rcnn_shapes.yaml")
TINY = (
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"),
    *("INPUT.MIN_SIZE_TRAIN", "(40,)", "INPUT.MIN_SIZE_TEST", "40", "SOLVER.IMS_PER_BATCH", "2"),
)


@pytest.fixture(autouse=True)
def _shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "not here")
    with small_shapes(tmp_path / "datasets"):
        yield


@pytest.mark.slow
def test_faster_rcnn_is_an_arm(tmp_path: Path) -> None:
    """What it does not have, such as queries, is empty in the report; all else is there."""
    arms = (
        Arm("faster_rcnn", FASTER_RCNN, TINY, seeds=(0,)),
        Arm("detr", DETR, tuple(WORDS), seeds=(0,), reference="faster_rcnn"),
    )
    groups = {"All": ["faster_rcnn", "detr"]}
    study = Study("", arms, groups, iterations=3, evaluations=2, rank_period=2, threshold=0.0)
    runs = plan_runs(study, tmp_path / "study")
    for run in runs:
        train(run)
    time_evaluations(runs, lambda run: None)
    assert "a GeneralizedRCNN has neither" in (runs[0].path / "log.txt").read_text()

    write_report(compare_study(study, runs), tmp_path / "report", command="", images=2)
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert content["missing"] == []
    tables = {table["key"]: table["rows"] for table in content["sections"][0]["tables"]}
    for row in (*tables["accuracy"], *tables["differences"], *tables["efficiency"]):
        assert None not in row[:3], row
    assert [row[0] for row in tables["queries"]] == ["detr"]
    matching = dict(
        zip(("faster_rcnn", "detr"), (row[1:] for row in tables["matching"]), strict=True)
    )
    assert not any(matching["faster_rcnn"])
    assert all(matching["detr"])
    assert all(row[1] is None and row[2] is not None for row in tables["rank"])
    assert len(content["pictures"]) == 2
    assert set(content["pictures"][0]["files"]) == {"truth", "faster_rcnn", "detr"}


def _train_net(output: Path, *words: str) -> object:
    arguments = ["--config-file", FASTER_RCNN, *words]
    arguments += [*TINY, "OUTPUT_DIR", str(output), "SOLVER.CHECKPOINT_PERIOD", "2"]
    return train_net.main(default_argument_parser().parse_args(arguments))


@pytest.mark.slow
def test_train_net(tmp_path: Path) -> None:
    """A resumed run equals one that was not interrupted; its weights give the same results."""
    results = _train_net(tmp_path / "whole", "SOLVER.MAX_ITER", "3")
    _train_net(tmp_path / "resumed", "SOLVER.MAX_ITER", "3")
    (tmp_path / "resumed" / "last_checkpoint").write_text("model_0000001.pth")
    _train_net(tmp_path / "resumed", "--resume", "SOLVER.MAX_ITER", "3")
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("whole", "resumed")
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    weights = str(tmp_path / "whole" / "model_final.pth")
    found = _train_net(tmp_path / "evaluated", "--eval-only", "MODEL.WEIGHTS", weights)
    assert json.dumps(found) == json.dumps(results)  # in which NaN equals NaN


def test_the_arms_see_the_same_images(tmp_path: Path) -> None:
    runs = plan_runs(read_study(ROOT / "configs/studies/shapes_faster_rcnn.yaml"), tmp_path)
    assert [run.arm.name for run in runs] == 3 * ["faster_rcnn", "detr", "miti_detr"]
    first, *others = [setup_config(run.arm.config_file, run.options) for run in runs[:3]]
    assert first.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    for cfg in others:
        assert cfg.INPUT == first.INPUT
        assert cfg.DATASETS == first.DATASETS
        assert cfg.SOLVER.IMS_PER_BATCH == first.SOLVER.IMS_PER_BATCH
        assert cfg.SOLVER.MAX_ITER == first.SOLVER.MAX_ITER == 1000


def test_classes_are_those_of_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """Keys of DETR say nothing about another model."""
    of_detr = ["MODEL.DETR.NUM_CLASSES", "80", "MODEL.DETR.NUM_OBJECT_QUERIES", "1"]
    with caplog.at_level(logging.WARNING, logger="miti_detr"):
        check_datasets(setup_config(FASTER_RCNN, of_detr))
    assert not caplog.records
    with pytest.raises(ValueError, match=r"Add the override MODEL\.ROI_HEADS\.NUM_CLASSES 3"):
        check_datasets(setup_config(FASTER_RCNN, ["MODEL.ROI_HEADS.NUM_CLASSES", "80"]))


def test_doubt_about_the_optimizer() -> None:
    """Detectron2's learning rate of 0.02 is for SGD."""

    def found(*words: str) -> list[str]:
        return list(doubts(setup_config(FASTER_RCNN, words), num_images=2000, from_scratch=True))

    assert not found()
    (line,) = found("SOLVER.BASE_LR", "0.02")
    assert "SOLVER.OPTIMIZER SGD" in line
    assert not found("SOLVER.BASE_LR", "0.02", "SOLVER.OPTIMIZER", "SGD")


def test_no_features_are_kept() -> None:
    words = [*TINY, "MODEL.BACKBONE.CACHE_FEATURES", "2", "SOLVER.BACKBONE_MULTIPLIER", "0"]
    with pytest.raises(ValueError, match="needs a MitiDetr; this is a GeneralizedRCNN"):
        Trainer(setup_config(FASTER_RCNN, words))
