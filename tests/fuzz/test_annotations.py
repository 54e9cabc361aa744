"""Whatever an annotation file holds: it works, or one error says why before the run.

*Works* means that all boxes reach the model, and that detections equal to the truth have AP 100
with both evaluators.
"""

import copy
import json
import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from miti_detr.data import build_test_loader, check_datasets, register_coco_format
from miti_detr.evaluation import InstanceEvaluator
from tests.data.helpers import make_cfg

from .budget import budget

XYXY = BoxMode.XYXY_ABS
SIZE = (40, 30)  # width, height
BOXES = {  # file name to class and box (xywh)
    "a.png": [(0, [1, 2, 10, 12]), (1, [15, 4, 20.5, 20])],
    "b c.png": [(1, [0, 0, 40, 30])],
    "d.png": [(0, [3.5, 3, 6, 6]), (0, [20, 10, 8, 9]), (1, [5, 12, 9, 9])],
}
# Written differently, these mean the same to a person.
SAME_ID = [lambda i: i, lambda i: str(i), float, lambda i: f" {i} ", lambda i: f"{i}.0"]
OTHER = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**53 + 1, 10**400, -(2**63)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "0", "1", "2.0", "true", "a", "é", "none", "1e999", "\ud800"]),
    st.sampled_from([[], [1], [[1, 2]], {}, {"a": 1}, [1, 2, 3, 4], ["1", "2", "3", "4"]]),
)


def content() -> dict[str, Any]:
    """A sound file; ids from 1."""
    images: list[Any] = []
    annotations: list[Any] = []
    for name, objects in BOXES.items():
        images.append(
            {"id": len(images) + 1, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
        )
        for label, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": label + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "segmentation": [[1, 1, 9, 1, 9, 9]],
                }
            )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog", "supercategory": "pet"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for file in BOXES:
            Image.new("RGB", SIZE, (9, 99, 199)).save(Path(name) / file)
        yield Path(name)


def run(folder: Path, data: dict[str, Any] | bytes, *overrides: Any) -> str:
    """``works``, or the error of the check. Whatever else is raised is a failure."""
    path = folder / "truth.json"
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    entry = [["fuzzed", str(path), str(folder)]]
    cfg = make_cfg(
        *("DATASETS.COCO_FORMAT", entry, "DATASETS.TRAIN", ("fuzzed",)),
        *("DATASETS.TEST", ("fuzzed",), "OUTPUT_DIR", str(folder / "out"), *overrides),
    )
    logging.disable(logging.WARNING)
    try:
        register_coco_format(cfg)
        try:
            check_datasets(cfg)
        except (ValueError, OSError) as error:
            return one_line(error)
        if cfg.DATASETS.BAD_ANNOTATIONS == "error":  # no annotation is lost
            kept = sum(len(d["annotations"]) for d in DatasetCatalog.get("fuzzed"))
            assert kept == len(json.loads(path.read_bytes())["annotations"])
        check_works(cfg)
        return "works"
    finally:
        logging.disable(logging.NOTSET)
        if "fuzzed" in DatasetCatalog:
            DatasetCatalog.remove("fuzzed")
            MetadataCatalog.remove("fuzzed")


def one_line(error: Exception) -> str:
    """The first line of a message (the next ones list annotations), which must be readable."""
    line = str(error).splitlines()[0]
    assert len(line) < 600
    return line


def check_works(cfg: CfgNode) -> None:
    """Boxes of the loader against the dicts of the data set; both evaluators."""
    dicts = DatasetCatalog.get("fuzzed")
    truth = {
        Path(d["file_name"]).name: [a for a in d.get("annotations", []) if not a.get("iscrowd", 0)]
        for d in dicts
    }
    for fast in (True, False):
        metrics = evaluate(cfg, truth, InstanceEvaluator("fuzzed", cfg.OUTPUT_DIR, fast=fast))
        assert metrics["AP"] == pytest.approx(100, abs=1e-9), fast
        assert metrics["AR"] == pytest.approx(100, abs=1e-9), fast
    stock = COCOEvaluator("fuzzed", ("bbox",), False, cfg.OUTPUT_DIR, use_fast_impl=False)
    assert evaluate(cfg, truth, stock)["AP"] == pytest.approx(100, abs=1e-9)


def evaluate(cfg: CfgNode, truth: dict[str, Any], evaluator: Any) -> dict[str, float]:
    evaluator.reset()
    for batch in build_test_loader(cfg, "fuzzed"):
        outputs = []
        for item in batch:
            objects = truth[Path(item["file_name"]).name]
            corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], XYXY) for a in objects]
            boxes = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4)
            instances = Instances((item["height"], item["width"]), pred_boxes=Boxes(boxes))
            instances.scores = torch.full((len(boxes),), 0.9)
            instances.pred_classes = torch.tensor([a["category_id"] for a in objects]).long()
            outputs.append({"instances": instances})
        evaluator.process(batch, outputs)
    return evaluator.evaluate()["bbox"]


def boxes_of(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """File name to class and box of what the loader gets, to compare with :data:`BOXES`."""
    path = folder / "truth.json"
    path.write_text(json.dumps(data))
    cfg = make_cfg("DATASETS.COCO_FORMAT", [["fuzzed", str(path), str(folder)]])
    register_coco_format(cfg)
    try:
        return {
            Path(d["file_name"]).name: [(a["category_id"], a["bbox"]) for a in d["annotations"]]
            for d in DatasetCatalog.get("fuzzed")
        }
    finally:
        DatasetCatalog.remove("fuzzed")
        MetadataCatalog.remove("fuzzed")


def test_a_sound_file_works_and_is_used_as_it_is(folder: Path) -> None:
    assert run(folder, content()) == "works"
    assert not (folder / "out" / "annotations").exists()


@pytest.mark.slow
@budget
@given(data=st.data())
def test_any_value_of_any_field(folder: Path, data: st.DataObject) -> None:
    """One to three fields of the file get any other value, or are missing."""
    changed = content()
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(["images", "annotations", "categories"]))
        entry = data.draw(st.sampled_from(changed[key]))
        field = data.draw(st.sampled_from([*content()[key][0], "ignore", "supercategory"]))
        if data.draw(st.booleans()):
            entry[field] = data.draw(OTHER)
        else:
            entry.pop(field, None)
    run(folder, changed)
    run(folder, changed, "DATASETS.BAD_ANNOTATIONS", "drop")


@pytest.mark.slow
@budget
@given(data=st.data())
def test_any_value_in_all_entries(folder: Path, data: st.DataObject) -> None:
    """An exporter writes a field in its own way everywhere."""
    changed = content()
    key = data.draw(st.sampled_from(["images", "annotations", "categories"]))
    field = data.draw(st.sampled_from(list(changed[key][0])))
    value = data.draw(OTHER)
    for entry in changed[key]:
        entry[field] = value
    run(folder, changed)


@pytest.mark.slow
@budget
@given(data=st.data())
def test_equivalent_files_give_the_same_boxes(folder: Path, data: st.DataObject) -> None:
    """Ids written differently, flags and areas missing, odd segmentations: nothing is lost."""
    changed = content()
    start = data.draw(st.sampled_from([-5, -1, 0, 1, 7, 2**53]))
    first = data.draw(st.sampled_from([-1, 0, 1, 5]))
    for category in changed["categories"]:
        category["id"] = data.draw(st.sampled_from(SAME_ID))(category["id"] + first)
    forms = {key: data.draw(st.sampled_from(SAME_ID)) for key in ("image", "reference")}
    for image in changed["images"]:
        image["id"] = forms["image"](image["id"] + start)
    for i, annotation in enumerate(changed["annotations"]):
        annotation["image_id"] = forms["reference"](annotation["image_id"] + start)
        annotation["category_id"] = data.draw(st.sampled_from(SAME_ID))(
            annotation["category_id"] + first
        )
        annotation["id"] = data.draw(st.sampled_from([i, i + 1, None, str(i), 3, -i, float(i)]))
        annotation["iscrowd"] = data.draw(st.sampled_from([0, None, "0", False, 0.0, "false"]))
        annotation["area"] = data.draw(
            st.sampled_from([None, "", 0, -5, math.nan, math.inf, 1e20, "12", 12, [], True])
        )
        annotation["segmentation"] = data.draw(
            st.sampled_from(
                [[], [[]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6], "x", {"counts": 3}, None]
            )
        )
        annotation["keypoints"] = data.draw(st.sampled_from([[], [[1, 2, 3]], "x", None, {}]))
    if start == 2**53 and float in forms.values():
        return  # these floats are not exact
    assert run(folder, changed) == "works"
    assert boxes_of(folder, changed) == BOXES


@budget
@given(data=st.data())
def test_any_value_in_dicts(folder: Path, data: st.DataObject) -> None:
    """A user's own function, in which one or two fields have any other value, or are missing."""
    records: list[Any] = [
        {
            **{"file_name": str(folder / name), "image_id": i, "width": SIZE[0], "height": SIZE[1]},
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": 0}
                for label, box in objects
            ],
        }
        for i, (name, objects) in enumerate(BOXES.items())
    ]
    for _ in range(data.draw(st.integers(1, 2))):
        record = data.draw(st.sampled_from(records))
        if data.draw(st.booleans()) and isinstance(record.get("annotations"), list):
            record = data.draw(st.sampled_from(record["annotations"] or [record]))
        if isinstance(record, dict) and record:
            field = data.draw(st.sampled_from(sorted(record)))
            record[field] = data.draw(OTHER)
            if record[field] is None and data.draw(st.booleans()):
                del record[field]
    cfg = make_cfg("DATASETS.TRAIN", ("fuzzed",), "DATASETS.TEST", ("fuzzed",))
    cfg.OUTPUT_DIR = str(folder / "out")
    cfg.DATASETS.BAD_ANNOTATIONS = data.draw(st.sampled_from(["error", "drop"]))
    DatasetCatalog.register("fuzzed", lambda: copy.deepcopy(records))
    MetadataCatalog.get("fuzzed").set(thing_classes=["cat", "dog"])
    logging.disable(logging.WARNING)
    try:
        try:
            check_datasets(cfg)
        except (ValueError, OSError) as error:
            one_line(error)
            return
        for batch in build_test_loader(cfg, "fuzzed"):
            assert all(len(item["image"]) == 3 for item in batch)
        (folder / "out").mkdir(exist_ok=True)
        if cfg.DATASETS.BAD_ANNOTATIONS == "error":
            check_works(cfg)
    finally:
        logging.disable(logging.NOTSET)
        DatasetCatalog.remove("fuzzed")
        MetadataCatalog.remove("fuzzed")


@pytest.mark.slow
@budget
@given(data=st.data())
def test_any_bytes(folder: Path, data: st.DataObject) -> None:
    """Bytes cut away, replaced or inserted; other encodings."""
    text = json.dumps(content(), ensure_ascii=False)
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le"]))
    raw = bytearray(text.encode(encoding))
    if data.draw(st.booleans()):
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
        raw[first:last] = data.draw(st.binary(max_size=9))
        run(folder, bytes(raw))
    else:
        assert run(folder, bytes(raw)) == "works"


@budget
@given(data=st.data())
def test_any_structure(folder: Path, data: st.DataObject) -> None:
    """Lists that are missing, empty, doubled, or of another type."""
    changed: dict[str, Any] = content()
    key = data.draw(st.sampled_from(list(changed)))
    how = data.draw(st.sampled_from(["pop", "empty", "double", "other", "wrap", "one"]))
    if how == "pop":
        del changed[key]
    elif how == "double":
        changed[key] += copy.deepcopy(changed[key])
    elif how == "one":
        changed[key].append(data.draw(OTHER))
    else:
        changed[key] = {"empty": [], "other": data.draw(OTHER), "wrap": [changed[key]]}[how]
    result = run(folder, changed)
    assert how == "double" or result != "works"


def test_names_with_other_separators(folder: Path) -> None:
    """Windows and URLs: ``images\\\\a.png``, ``b%20c.png``; a real backslash or % wins."""
    changed = content()
    changed["images"][0]["file_name"] = ".\\a.png"
    changed["images"][1]["file_name"] = "b%20c.png"
    assert run(folder, changed) == "works"
    assert boxes_of(folder, changed) == BOXES


def test_a_category_that_only_groups_others(folder: Path) -> None:
    """Exports of Roboflow begin with such a category, sometimes of the same name as the class."""
    for group in ("pets", "cat"):
        changed = content()
        changed["categories"] = [
            {"id": 0, "name": group, "supercategory": "none"},
            {"id": 1, "name": "cat", "supercategory": group},
            {"id": 2, "name": "dog", "supercategory": group},
        ]
        assert run(folder, changed) == "works"
        assert boxes_of(folder, changed) == BOXES


def test_two_categories_of_one_name(folder: Path) -> None:
    changed = content()
    changed["categories"][1]["name"] = "cat"
    assert "categories with the ids 1 and 2 have the same name 'cat'" in run(folder, changed)


@pytest.mark.parametrize("crowd", [1, "1", True])
def test_nothing_to_train_on(folder: Path, crowd: Any) -> None:
    changed = content()
    for annotation in changed["annotations"]:
        annotation["iscrowd"] = crowd
    assert "have no object" in run(folder, changed)
    assert "have no object" in run(folder, {**changed, "annotations": []})


def test_results_carry_the_ids_of_the_file(folder: Path) -> None:
    """Text ids in, text ids out."""
    changed = content()
    for image in changed["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in changed["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"
        annotation["category_id"] = "xy"[annotation["category_id"] - 1]
    for category in changed["categories"]:
        category["id"] = "xy"[category["id"] - 1]
    path = folder / "truth.json"
    path.write_text(json.dumps(changed))
    cfg = make_cfg(
        *("DATASETS.COCO_FORMAT", [["fuzzed", str(path), str(folder)]]),
        *("DATASETS.TEST", ("fuzzed",), "OUTPUT_DIR", str(folder / "out")),
    )
    register_coco_format(cfg)
    try:
        truth = {Path(d["file_name"]).name: d["annotations"] for d in DatasetCatalog.get("fuzzed")}
        evaluate(cfg, truth, InstanceEvaluator("fuzzed", cfg.OUTPUT_DIR))
    finally:
        DatasetCatalog.remove("fuzzed")
        MetadataCatalog.remove("fuzzed")
    results = json.loads((folder / "out" / "coco_instances_results.json").read_text())
    found = sorted((r["image_id"], r["category_id"]) for r in results)
    assert found == sorted((a["image_id"], a["category_id"]) for a in changed["annotations"])
    np.testing.assert_array_equal([r["score"] for r in results], np.float32(0.9))
