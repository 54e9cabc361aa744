"""``miti-detr report`` from end to end, and the threshold that it stores."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model

from miti_detr import load_predictor
from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.cli.main import main
from miti_detr.data import build_test_loader
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.evaluation.build import build_evaluator
from miti_detr.report.store import store_threshold
from tests.helpers import tiny_config
from tests.small_shapes import small_shapes

Capture = pytest.CaptureFixture[str]
LEAST = ["--resamples", "5", "--pictures", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    cfg = tiny_config()
    torch.manual_seed(0)
    MitiDetrCheckpointer(build_model(cfg), str(folder), cfg=cfg).save("tiny", iteration=7)
    return str(folder / "tiny.pth")


def found_objects(weights: str, shapes: Path, file: Path) -> None:
    """Write an annotation file whose objects are the two best detections of each image."""
    content = json.loads((shapes / "val.json").read_text())
    predictor = load_predictor(weights, threshold=0.0)
    content["annotations"] = []
    for image in content["images"]:
        result = predictor(str(shapes / "val" / image["file_name"]))
        for found in result.to_coco(image["id"])[:2]:
            area = found["bbox"][2] * found["bbox"][3]
            more = {"id": len(content["annotations"]) + 1, "area": area, "iscrowd": 0}
            content["annotations"].append({**found, **more})
    file.write_text(json.dumps(content))


@pytest.mark.slow
def test_a_report_stores_its_threshold(weights: str, tmp_path: Path, capsys: Capture) -> None:
    """AP is that of the evaluation with one image per batch; predict takes the threshold."""
    mine, name = shutil.copy(weights, tmp_path / "mine.pth"), f"found_{tmp_path.name}"
    with small_shapes(tmp_path / "data") as shapes:
        found_objects(weights, shapes, tmp_path / "found.json")
        entry = [name, str(tmp_path / "found.json"), str(shapes / "val")]
        data = ["DATASETS.COCO_FORMAT", str([entry]), "OUTPUT_DIR", str(tmp_path / "out")]
        words = ["report", str(mine), name, "--output", str(tmp_path / "out"), *LEAST]
        assert main([*words, "--store-threshold", "--against", weights, *data]) == 0
        cfg = load_config(weights=weights, overrides=["TEST.IMS_PER_BATCH", "1", *data])
        evaluator = build_evaluator(cfg, name, str(tmp_path))
        metrics = inference_on_dataset(
            Predictor(cfg).model, build_test_loader(cfg, name), evaluator
        )["bbox"]
    assert metrics["AP"] > 50
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    tables = {t["key"]: t for s in content["sections"] for t in s["tables"]}
    for name, cell in tables["coco"]["rows"]:
        value = cell["mean"] if isinstance(cell, dict) else cell
        assert value is None or value == pytest.approx(metrics[name], abs=1e-9)
    assert tables["difference"]["rows"][0][3]["mean"] == 0
    printed = capsys.readouterr().out
    assert "stored the threshold" in printed
    predictor = load_predictor(mine)
    assert predictor.threshold == content["threshold"]
    assert f"threshold {predictor.threshold:.4g} (recorded)" in repr(predictor)
    assert load_predictor(mine, threshold=0.3).threshold == 0.3
    assert "(recorded)" not in repr(load_predictor(weights))


@pytest.mark.slow
def test_no_threshold_without_a_true_detection(
    weights: str, tmp_path: Path, capsys: Capture
) -> None:
    with small_shapes(tmp_path / "data") as shapes:
        content = json.loads((shapes / "val.json").read_text())
        for annotation in content["annotations"]:
            annotation["bbox"] = [0, 0, 1, 1]
        file = tmp_path / "tiny.json"
        file.write_text(json.dumps(content))
        words = ["report", weights, str(file), "--images", str(shapes / "val"), *LEAST]
        assert main([*words, "--output", str(tmp_path / "out"), "--store-threshold"]) == 1
    assert "there is no threshold to store" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").is_file()


def test_all_else_in_the_checkpoint_stays(weights: str, tmp_path: Path) -> None:
    path = str(tmp_path / "copy.pth")
    shutil.copy(weights, path)
    store_threshold(path, 0.25)
    before, after = (torch.load(file, weights_only=True) for file in (weights, path))
    assert after["miti_detr"].pop("threshold") == 0.25
    assert after["miti_detr"] == before["miti_detr"]
    assert after["iteration"] == 7
    assert list(after["model"]) == list(before["model"])
    torch.testing.assert_close(after["model"], before["model"], rtol=0, atol=0)
    Predictor(load_config(weights=path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.pth"]


@pytest.mark.parametrize(("value", "message"), [(1.5, "threshold 1.5"), (float("nan"), "nan")])
def test_impossible_thresholds_change_nothing(
    weights: str, tmp_path: Path, value: float, message: str
) -> None:
    path = tmp_path / "copy.pth"
    shutil.copy(weights, path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        store_threshold(str(path), value)
    assert path.read_bytes() == content


def test_bad_input_is_one_line(weights: str, tmp_path: Path, capsys: Capture) -> None:
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": {"a": torch.zeros(1)}}, foreign)
    (tmp_path / "exported.onnx").write_bytes(b"")
    out = ["--output", str(tmp_path / "out")]
    cases = [
        (["gone.pth", "shapes_val"], "gone.pth"),
        ([weights, "nowhere"], "'nowhere' is not registered"),
        ([str(foreign), "shapes_val", "--store-threshold"], "no threshold can be stored"),
        ([str(tmp_path / "exported.onnx"), "x", "--store-threshold"], "no threshold can be stored"),
        ([weights, "shapes_val", "MODEL.NOTHING", "1"], "MODEL.NOTHING"),
    ]
    for words, message in cases:
        assert main(["report", *words, *out]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not (tmp_path / "out").exists()
