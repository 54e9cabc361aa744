import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from PIL import Image

from miti_detr.data import build_test_loader
from miti_detr.evaluation import InstanceEvaluator, build_evaluator, coco_table
from miti_detr.evaluation.coco import RECALLS, encoded
from miti_detr.modeling.segmentation import RunLengthMasks
from tests.engine.stub import config

SIZE = 300
CATEGORY_IDS = (3, 7, 8)  # of the data set; classes 0, 1, 2


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """xywh, small, medium and large by COCO's areas."""
    corner = rng.uniform(0, SIZE / 2, (count, 2))
    side = np.exp(rng.uniform(np.log(4), np.log(SIZE / 2), (count, 2)))
    return np.concatenate([corner, side], axis=1)


@pytest.fixture
def truth(tmp_path: Path) -> Any:
    """A data set of 12 images with crowds and an image without objects; xywh and class by image."""
    rng = np.random.default_rng(1)
    images, annotations, boxes = [], [], {}
    for image_id in range(12):
        images.append({"id": image_id, "file_name": "", "height": SIZE, "width": SIZE})
        labels = rng.integers(0, 3, (9, 1))
        found = np.concatenate([_boxes(rng, 9), labels], axis=1)
        boxes[image_id] = [] if image_id == 5 else found.tolist()
        for x, y, w, h, label in boxes[image_id]:
            annotation = {"image_id": image_id, "category_id": CATEGORY_IDS[int(label)]}
            annotation |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(rng.random() < 0.1)}
            annotations.append({"id": len(annotations) + 1, **annotation})
    path = tmp_path / "truth.json"
    categories = [{"id": i, "name": f"c{i}"} for i in CATEGORY_IDS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    name = "evaluation_test"
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=[c["name"] for c in categories],
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(CATEGORY_IDS)},
    )
    yield name, boxes
    MetadataCatalog.remove(name)


def _run(evaluator: InstanceEvaluator, boxes: dict[int, list[list[float]]]) -> dict[str, float]:
    """Detections near the truth and others; the same in each call."""
    rng = np.random.default_rng(2)
    evaluator.reset()
    for image_id, true in boxes.items():
        near = np.repeat(np.array(true).reshape(-1, 5), 3, axis=0)
        near[:, :4] *= rng.uniform(0.9, 1.1, (len(near), 4))
        found = np.concatenate([near[:, :4], _boxes(rng, 90)])
        labels = np.concatenate([near[:, 4], rng.integers(0, 3, 90)])
        instances = Instances((SIZE, SIZE))
        instances.pred_boxes = Boxes(
            BoxMode.convert(torch.from_numpy(found), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        )
        instances.scores = torch.from_numpy(rng.uniform(size=len(found)).round(2))  # with ties
        instances.pred_classes = torch.from_numpy(labels).long()
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def test_fast_evaluation_has_the_statistics_of_pycocotools(truth: Any, tmp_path: Path) -> None:
    """Same detections, both implementations: all 12 statistics and the class APs to 1e-12."""
    name, boxes = truth
    pytest.importorskip("faster_coco_eval")
    fast = InstanceEvaluator(name, str(tmp_path), fast=True)
    slow = InstanceEvaluator(name, str(tmp_path), fast=False)
    assert fast._eval_class is not slow._eval_class
    fast_results, slow_results = _run(fast, boxes), _run(slow, boxes)

    assert list(fast_results) == list(slow_results)
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP-c3", *RECALLS} <= set(slow_results)
    assert 1 < slow_results["AP"] < 99
    for key, value in slow_results.items():
        torch.testing.assert_close(fast_results[key], value, rtol=0, atol=1e-12)


def test_results_have_the_ids_of_the_data_set(truth: Any, tmp_path: Path) -> None:
    name, boxes = truth
    _run(InstanceEvaluator(name, str(tmp_path)), boxes)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} == set(CATEGORY_IDS)


def test_no_detections_give_nan(truth: Any, tmp_path: Path) -> None:
    name, _ = truth
    evaluator = InstanceEvaluator(name, str(tmp_path))
    evaluator.reset()
    instances = Instances((SIZE, SIZE), pred_boxes=Boxes(torch.zeros(0, 4)))
    instances.scores, instances.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    evaluator.process([{"image_id": 0}], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    assert np.isnan([results["AP"], results["AR"]]).all()
    assert "nan" in coco_table({name: {"bbox": results}})


def _masks(rng: np.random.Generator, boxes: np.ndarray) -> torch.Tensor:
    """Ellipses in boxes (xywh), with a random part missing; (D, SIZE, SIZE) bool."""
    y, x = np.mgrid[:SIZE, :SIZE][:, None]
    left, top, width, height = boxes.T[:, :, None, None]
    inside = ((x - left) / width - 0.5) ** 2 + ((y - top) / height - 0.5) ** 2 <= 0.25
    cut = top + height * rng.uniform(0.6, 1.5, (len(boxes), 1, 1))
    return torch.from_numpy(inside & (y < cut))


def test_fast_mask_evaluation_has_the_statistics_of_pycocotools(tmp_path: Path) -> None:
    """Polygons, run lengths and crowds as truth; bool and run lengths as predictions; to 1e-12.

    Some detections lie on the limits: the mask of the truth itself (IoU 1), one that covers exactly
    half or three quarters of it, an empty one, and objects of exactly 32^2 and 96^2 pixels.
    """
    pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(3)
    annotations, found = [], {}
    for image_id in range(6):
        boxes = _boxes(rng, 6)
        masks = _masks(rng, boxes)
        masks[4], masks[5] = False, False
        masks[4, 10:42, 10:42] = True
        masks[5, 100:196, 100:196] = True
        for k, mask in enumerate(masks):
            shape: Any = encoded(mask[None])[0]
            if k in (0, 4):
                x, y, w, h = boxes[k] if k == 0 else (10, 10, 32, 32)
                shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORY_IDS[k % 3],
                    "segmentation": shape,
                    "iscrowd": int(k == 1),
                    "area": float(mask.sum()),
                    "bbox": boxes[k].tolist(),
                }
            )
        half, most = masks.clone(), masks.clone()
        half[5, 148:], most[5, 172:] = False, False
        others = _masks(rng, _boxes(rng, 20))
        everything = torch.cat([masks, half, most, others, torch.zeros_like(masks[:1])])
        instances = Instances((SIZE, SIZE), pred_boxes=BitMasks(everything).get_bounding_boxes())
        instances.pred_masks = everything
        instances.scores = torch.from_numpy(rng.uniform(size=len(everything)).round(1))
        instances.pred_classes = torch.arange(len(everything)) % 3
        found[image_id] = instances
    path, name = tmp_path / "truth.json", "mask_evaluation_test"
    images = [{"id": i, "file_name": "", "height": SIZE, "width": SIZE} for i in range(6)]
    categories = [{"id": i, "name": f"c{i}"} for i in CATEGORY_IDS]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    mapping = {c: i for i, c in enumerate(CATEGORY_IDS)}
    MetadataCatalog.get(name).set(json_file=str(path), thing_dataset_id_to_contiguous_id=mapping)
    results = []
    for fast, as_runs in ((True, False), (False, False), (True, True)):
        evaluator = InstanceEvaluator(name, str(tmp_path), tasks=("bbox", "segm"), fast=fast)
        evaluator.reset()
        for image_id, instances in found.items():
            instances = Instances(instances.image_size, **instances.get_fields())
            if as_runs:
                instances.pred_masks = RunLengthMasks.encode(instances.pred_masks)
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        results.append(evaluator.evaluate())
    stock = COCOEvaluator(name, ("bbox", "segm"), False, str(tmp_path), use_fast_impl=False)
    stock.reset()
    for image_id, instances in found.items():
        stock.process([{"image_id": image_id}], [{"instances": instances}])
    stock_results = stock.evaluate()
    MetadataCatalog.remove(name)
    for task in ("bbox", "segm"):
        assert stock_results[task]["AP"] == pytest.approx(results[0][task]["AP"], abs=1e-12)
        first, second, third = (r[task] for r in results)
        assert 1 < second["AP"] < 99
        assert {"APs", "APm", "APl", *RECALLS} <= set(second)
        for key, value in second.items():
            torch.testing.assert_close(first[key], value, rtol=0, atol=1e-12)
            torch.testing.assert_close(third[key], value, rtol=0, atol=1e-12)
    assert results[0]["bbox"]["AP"] != results[0]["segm"]["AP"]
    stored = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert stored[0]["segmentation"]["size"] == [SIZE, SIZE]


def test_classes_that_the_data_set_does_not_have_are_left_out(truth: Any, tmp_path: Path) -> None:
    """A panoptic model also finds stuff, for which there are no boxes."""
    name, boxes = truth
    evaluator = InstanceEvaluator(name, str(tmp_path))
    expected = _run(evaluator, boxes)
    process = evaluator.process

    def with_stuff(inputs: list[Any], outputs: list[Any]) -> None:
        things = outputs[0]["instances"]
        stuff = Instances(things.image_size, **things.get_fields())
        stuff.pred_classes = stuff.pred_classes + 3
        process(inputs, [{"instances": Instances.cat([things, stuff])}])

    evaluator.process = with_stuff  # type: ignore
    assert _run(evaluator, boxes) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("field", ["pred_boxes", "scores"])
def test_a_detection_that_is_not_finite_names_its_image(
    truth: Any, tmp_path: Path, field: str
) -> None:
    evaluator = InstanceEvaluator(truth[0], str(tmp_path))
    evaluator.reset()
    instances = Instances((SIZE, SIZE), pred_boxes=Boxes(torch.ones(2, 4)))
    instances.scores, instances.pred_classes = torch.ones(2), torch.zeros(2, dtype=torch.long)
    bad = instances.pred_boxes.tensor if field == "pred_boxes" else instances.scores
    bad[1] = float("nan")
    item = {"image_id": 3, "file_name": "images/3.png"}
    with pytest.raises(ValueError, match=r"1 of 2 detections of the image images/3\.png are not f"):
        evaluator.process([item], [{"instances": instances}])


def test_an_image_that_comes_twice_counts_once(truth: Any, tmp_path: Path) -> None:
    """As the loader returns it in place of one that cannot be read."""
    name, boxes = truth
    once = _run(InstanceEvaluator(name, str(tmp_path)), boxes)
    evaluator = InstanceEvaluator(name, str(tmp_path))
    process = evaluator.process
    evaluator.process = lambda *batch: [process(*batch) for _ in range(2)]  # type: ignore
    assert _run(evaluator, boxes) == pytest.approx(once, nan_ok=True)


def test_falls_back_to_pycocotools(
    truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name, _ = truth
    real_import = builtins.__import__

    def no_fast(module: str, *args: Any) -> Any:
        if module.startswith("faster_coco_eval"):
            raise ImportError(module)
        return real_import(module, *args)

    monkeypatch.setattr(builtins, "__import__", no_fast)
    with caplog.at_level("INFO", logger="miti_detr"):
        evaluator = InstanceEvaluator(name, str(tmp_path), fast=True)
    assert evaluator._eval_class.__module__ == "pycocotools.cocoeval"
    assert caplog.text.count("faster-coco-eval is not installed") == 1


@pytest.mark.parametrize("image_id", [4, "four", None])
def test_evaluates_a_data_set_that_is_not_in_coco_format(tmp_path: Path, image_id: Any) -> None:
    """A perfect detection of the one object has AP 100, whatever names the image."""
    name = "dicts_evaluation_test"
    box = {"bbox": [10, 20, 60, 90], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    file = tmp_path / "image.png"
    Image.new("RGB", (80, 100)).save(file)
    record = {"file_name": str(file), "height": 100, "width": 80, "annotations": [box]}
    if image_id is not None:
        record["image_id"] = image_id
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    cfg = config(tmp_path, tmp_path / "out", DATASETS__COCO_FORMAT=[])
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    instances = Instances((100, 80), pred_boxes=Boxes(torch.tensor([[10.0, 20, 60, 90]])))
    instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
    (batch,) = build_test_loader(cfg, name)
    evaluator.process(batch, [{"instances": instances}])
    try:
        torch.testing.assert_close(evaluator.evaluate()["bbox"]["AP"], 100.0, rtol=0, atol=1e-9)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert (tmp_path / "out" / "inference" / name / "coco_instances_results.json").is_file()
