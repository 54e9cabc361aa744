"""Objects of data sets, and the detections of models on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from miti_detr.predict.predictor import DetectionPredictor
from miti_detr.report.predictions import detect_all, match_classes
from miti_detr.report.truth import read_truth
from tests.predict.conftest import FixedBackend
from tests.visualize.test_detections import register_images


def test_a_file_and_a_registered_name_give_the_same(tmp_path: Path) -> None:
    """A crowd and an object in each of 3 images; areas are those of the file."""
    name = register_images(tmp_path, 3)
    for truth in (read_truth(name), read_truth(str(tmp_path / "val.json"))):
        assert truth.class_names == ["c0", "c1", "c2"]
        assert truth.files == [str(tmp_path / f"{index}.png") for index in range(3)]
        assert truth.image.tolist() == [0, 0, 1, 1, 2, 2]
        assert truth.label.tolist() == [0] * 6
        assert truth.crowd.tolist() == [False, True] * 3
        assert truth.boxes[0].tolist() == [50, 10, 45, 35]
        assert truth.area[0] == 45 * 35
        assert truth.sizes.tolist() == [[50, 100]] * 3


def test_a_data_set_without_a_file(tmp_path: Path) -> None:
    record = {
        "file_name": str(tmp_path / "0.png"),
        "image_id": 7,
        "height": 50,
        "width": 100,
        "annotations": [
            {"bbox": [10, 10, 30, 20], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
        ],
    }
    name = f"records_{tmp_path.name}"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(thing_classes=["a", "b"])
    truth = read_truth(name)
    assert truth.class_names == ["a", "b"]
    assert truth.label.tolist() == [1]
    assert truth.boxes.tolist() == [[10, 10, 20, 10]]
    assert truth.files == [str(tmp_path / "0.png")]


def test_bad_data_sets_are_named(tmp_path: Path) -> None:
    name = register_images(tmp_path, 1)
    with pytest.raises(ValueError, match="leave out --images"):
        read_truth(name, str(tmp_path))
    with pytest.raises(ValueError, match="'nowhere' is not registered"):
        read_truth("nowhere")
    with pytest.raises(OSError, match=r"gone\.json"):
        read_truth(str(tmp_path / "gone.json"))
    content = json.loads((tmp_path / "val.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(ValueError, match="1 images and no objects"):
        read_truth(str(tmp_path / "empty.json"))


def test_classes_are_matched_by_name() -> None:
    assert match_classes(["x", "y", "z"], ["z", "x"]).tolist() == [1, -1, 0]
    assert match_classes(["0", "1"], ["a", "b"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="the data set has the class 'b'"):
        match_classes(["a", "c"], ["a", "b"])


def test_detections_of_all_images(tmp_path: Path) -> None:
    """The same as the predictor's, as x, y, width and height, by decreasing score."""
    name = register_images(tmp_path, 2)
    truth = read_truth(name)
    predictor = DetectionPredictor(FixedBackend(), threshold=0.0)
    names = [*predictor.class_names]
    counts: list[int] = []
    object.__setattr__(truth, "class_names", names)
    found = detect_all(predictor, truth, advance=counts.append)
    assert sum(counts) == 2
    expected: list[Any] = []
    for index, file in enumerate(truth.files):
        boxes, scores, classes = predictor(file).found()[:3]
        for box, score, label in zip(boxes, scores, classes, strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            expected.append((-float(score), index, int(label), [*box[:2], width, height]))
    assert len(found.score) == len(expected) > 0
    expected.sort(key=lambda row: row[:2])
    for place, (score, image, label, box) in enumerate(expected):
        assert (found.image[place], found.label[place]) == (image, label)
        assert found.score[place] == -score
        np.testing.assert_array_equal(found.boxes[place], np.array(box, dtype=np.float64))


def test_images_of_another_size_are_named(tmp_path: Path) -> None:
    truth = read_truth(register_images(tmp_path, 1))
    Image.new("RGB", (60, 50)).save(tmp_path / "0.png")
    predictor = DetectionPredictor(FixedBackend(), threshold=0.0)
    object.__setattr__(truth, "class_names", predictor.class_names)
    with pytest.raises(ValueError, match=r"0\.png is 60 x 50 pixels, .* says 100 x 50"):
        detect_all(predictor, truth)
