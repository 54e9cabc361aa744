import json
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miti_detr.data.coco_format import register_coco
from miti_detr.engine.predictor import Predictor
from miti_detr.visualize.detections import (
    CAPTION,
    CELL,
    GAP,
    choose_images,
    compose_pairs,
    draw_detections,
)
from miti_detr.visualize.drawing import class_colour


def register_images(folder: Path, count: int, category: int = 1) -> str:
    """``count`` images of 100 x 50 pixels: an object in the right half, a crowd everywhere."""
    images, annotations = [], []
    for index in range(count):
        Image.new("RGB", (100, 50), (128, 128, 128)).save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": 100, "height": 50})
        for crowd, box in ((0, [50, 10, 45, 35]), (1, [0, 0, 100, 50])):
            record = {"image_id": index, "category_id": category, "bbox": box, "iscrowd": crowd}
            annotations.append({"id": len(annotations) + 1, "area": box[2] * box[3], **record})
    names = [{"id": index + 1, "name": f"c{index}"} for index in range(3)]
    content = {"images": images, "annotations": annotations, "categories": names}
    (folder / "val.json").write_text(json.dumps(content))
    name = f"pairs_{uuid.uuid4().hex}"
    register_coco(name, str(folder / "val.json"), str(folder))
    return name


def test_the_choice_of_images_is_even_and_fixed() -> None:
    assert choose_images(3, 11) == [0, 5, 10]
    assert choose_images(8, 3) == [0, 1, 2]
    assert choose_images(1, 5) == [0]
    assert choose_images(8, 300) == choose_images(8, 300)
    assert len(set(choose_images(8, 9))) == 8


def test_truth_is_left_and_detections_right(tmp_path: Path, predictor: Predictor) -> None:
    """Truth: class 0, right half, no crowd. Detections above 0.5: class 1, left half."""
    name = register_images(tmp_path, 3)
    draw_detections(predictor, name, tmp_path / "out.png", num_classes=2, images=2)
    pixels = np.asarray(Image.open(tmp_path / "out.png"))
    assert pixels.shape[1] == 2 * (2 * CELL + 3 * GAP)
    top = 3 * CAPTION
    truth = pixels[top : top + CELL // 2, GAP : GAP + CELL]
    found = pixels[top : top + CELL // 2, 2 * GAP + CELL : 2 * GAP + 2 * CELL]
    coloured = [
        [(part == class_colour(c)).all(-1).any(0).nonzero()[0] for c in (0, 1)]
        for part in (truth, found)
    ]
    assert coloured[0][0].min() >= CELL // 2 - 2
    assert coloured[0][1].size == 0
    assert coloured[1][1].max() <= CELL // 2 + 2
    assert coloured[1][0].size == 0


def test_the_same_twice(tmp_path: Path, predictor: Predictor) -> None:
    name = register_images(tmp_path, 5)
    for file in ("a.png", "b.png"):
        draw_detections(predictor, name, tmp_path / file, num_classes=2, images=3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_data_set_with_more_classes_than_the_model_is_refused(
    tmp_path: Path, predictor: Predictor
) -> None:
    name = register_images(tmp_path, 1, category=3)
    with pytest.raises(ValueError, match=r"0\.png has class 2, but the model has only 2 classes"):
        draw_detections(predictor, name, tmp_path / "out.png", num_classes=2)
    assert not (tmp_path / "out.png").exists()


def test_an_empty_data_set_is_named(tmp_path: Path, predictor: Predictor) -> None:
    name = register_images(tmp_path, 0)
    with pytest.raises(ValueError, match=f"'{name}' has no images"):
        draw_detections(predictor, name, tmp_path / "out.png", num_classes=2)


def test_pairs_of_odd_shapes_fit(tmp_path: Path) -> None:
    shapes = [(320, 1), (1, 320), (320, 320)]
    pairs = [(Image.new("RGB", s), Image.new("RGB", s[::-1]), "caption") for s in shapes]
    sheet = compose_pairs(pairs, "title")
    assert sheet.size == (2 * (2 * CELL + 3 * GAP), 2 * CAPTION + 2 * (320 + CAPTION + GAP))
    long = compose_pairs(pairs[:1], "a long title " * 20)
    assert long.width > 2 * CELL + 3 * GAP
