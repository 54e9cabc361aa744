import itertools
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch.testing import assert_close

import miti_detr
from miti_detr import load_predictor
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.predict import DetectionPredictor, Detections
from miti_detr.predict.predictor import batches
from miti_detr.predict.torch_backend import checkpoint_record
from tests.helpers import tiny_config
from tests.predict.conftest import FixedBackend
from tests.visualize.test_drawing import GREY, grey


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_one_image_and_lists(predictor: DetectionPredictor) -> None:
    result = predictor(grey(40, 30))
    assert result.boxes.tolist() == [[0, 0, 20, 30]]
    assert result.class_names == ["dog"]
    assert result.image_size == (30, 40)
    many = predictor([grey(10 + index % 3, 8) for index in range(50)])
    assert [one.boxes[0, 2] for one in many] == [(10 + index % 3) / 2 for index in range(50)]
    assert predictor([]) == []


def test_images_of_one_shape_share_a_batch() -> None:
    backend = FixedBackend()
    shapes = [(5, 6), (6, 5), (5, 6), (5, 6), (6, 5), (5, 6)]
    DetectionPredictor(backend, batch_size=3)([noise(*shape) for shape in shapes], channels="BGR")
    assert backend.batches == [3, 1, 2]
    assert batches([], 3) == []


def test_threshold_classes_and_top_k() -> None:
    backend = FixedBackend()
    found = DetectionPredictor(backend, threshold=0.2)(grey(4, 4))
    assert found.scores.tolist() == pytest.approx([0.9, 0.3])
    assert len(DetectionPredictor(backend, threshold=0.2, top_k=1)(grey(4, 4))) == 1
    for classes in (["cat"], [0], "cat"):
        only = DetectionPredictor(backend, threshold=0.2, classes=classes)(grey(4, 4))
        assert only.class_names == ["cat"]
    assert len(DetectionPredictor(backend, threshold=1.0)(grey(4, 4))) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, r"threshold is 1\.5"),
        ({"top_k": 0}, "top_k is 0"),
        ({"tile": 0}, "tile is 0"),
        ({"overlap": 1.0}, r"overlap is 1\.0"),
        ({"classes": ["bird"]}, "no class 'bird'. Its classes are cat, dog"),
        ({"classes": [2]}, "no class 2"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionPredictor(FixedBackend(), **options)


def test_coco_and_supervision(
    predictor: DetectionPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = predictor(grey(40, 30))
    wanted = {"image_id": 7, "category_id": 18, "bbox": [0, 0, 20, 30], "score": 0.9}
    assert result.to_coco(7) == [wanted]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        result.to_supervision()
    stub = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stub)
    fields = result.to_supervision()
    assert fields["xyxy"].shape == (1, 4)
    assert fields["class_id"].tolist() == [1]
    assert fields["data"]["class_name"].tolist() == ["dog"]


def test_drawing(predictor: DetectionPredictor, tmp_path: Path) -> None:
    result = predictor(grey(100, 80))
    picture = result.draw()
    assert picture.size == (100, 80)
    assert picture.getpixel((50, 40)) != GREY
    assert picture.getpixel((80, 40)) == GREY
    assert result.draw(grey(200, 160)).size == (200, 160)
    unknown = Detections(result.found(), image_size=(80, 100), classes=predictor.backend.classes)
    with pytest.raises(ValueError, match="the image is not known"):
        unknown.draw()


def test_a_stream(predictor: DetectionPredictor) -> None:
    images = (noise(8, 10 + index) for index in range(9))
    results = list(predictor.stream(images, channels="BGR", batch_size=2, draw=True))
    assert [result.image_size[1] for result in results] == list(range(10, 19))
    assert results[0].draw() is results[0].draw()  # it was drawn ahead


def test_a_stream_without_end(predictor: DetectionPredictor) -> None:
    """It stops when nobody reads it any more, and tells about an image that is none."""
    stream = predictor.stream(itertools.repeat(noise(8, 8)), channels="BGR")
    assert next(stream).image_size == (8, 8)
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="channels"):
        next(predictor.stream([noise(8, 8)]))


def test_tiles_find_what_the_whole_image_hides() -> None:
    """The stand-in finds the left half of each tile, too."""
    result = DetectionPredictor(FixedBackend(), tile=20, overlap=0.5)(grey(40, 20))
    assert len(result) > 1
    assert len(DetectionPredictor(FixedBackend(), tile=40)(grey(40, 20))) == 1


def test_a_checkpoint_agrees_with_the_model(weights: str) -> None:
    """Single, in a list, from several threads: the detections of the engine's predictor."""
    predictor = load_predictor(weights, threshold=0.0)
    plain = Predictor(load_config(weights=weights))
    images = [noise(60, 120), noise(200, 90), noise(60, 120, 1)]
    listed = predictor(images, channels="RGB")
    with ThreadPoolExecutor(3) as pool:
        threaded = list(pool.map(lambda image: predictor(image, channels="RGB"), images))
    for image, *results in zip(images, listed, threaded, strict=True):
        (wanted,) = plain([image])
        order = wanted.scores.argsort(descending=True)
        for result in results:
            assert isinstance(result, Instances)
            assert_close(result.scores, wanted.scores[order], rtol=0, atol=1e-5)
            boxes = wanted.pred_boxes.tensor[order]
            assert_close(result.pred_boxes.tensor, boxes, rtol=0, atol=1e-2)
    best = listed[0][listed[0].scores > listed[0].scores[1]]
    assert best.class_names == listed[0].class_names[:1]
    assert listed[0].to("cpu").draw().size == (120, 60)
    assert set(predictor.class_names) == {"circle", "square", "triangle"}
    assert predictor.provider == "torch cpu"


def test_the_orientation_of_files_is_that_of_the_config(weights: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(noise(40, 60)).save(path, exif=exif)
    assert load_predictor(weights)(path).image_size == (60, 40)
    overrides = ("DATASETS.EXIF_ORIENTATION", "ignore")
    result = load_predictor(weights, overrides=overrides)(path)
    assert result.image_size == result.draw().size[::-1] == (40, 60)


def test_detectron2s_visualizer_draws_a_result(weights: str) -> None:
    image = noise(60, 80)
    result = load_predictor(weights, threshold=0.0)(image, channels="RGB")
    picture = Visualizer(image, MetadataCatalog.get("shapes_val")).draw_instance_predictions(result)
    assert (picture.get_image() != image).any()


def test_tiles_of_a_checkpoint_are_instances(weights: str) -> None:
    result = load_predictor(weights, threshold=0.0, tile=64)(noise(80, 100), channels="RGB")
    assert isinstance(result, Instances)
    assert len(result) > 7
    assert result.scores.dtype == torch.float32


def test_a_recorded_threshold(weights: str, tmp_path: Path) -> None:
    data = torch.load(weights, weights_only=True)
    data["miti_detr"]["threshold"] = 0.25
    torch.save(data, tmp_path / "w.pth")
    assert load_predictor(tmp_path / "w.pth").threshold == 0.25
    assert load_predictor(weights).threshold == 0.5
    assert load_predictor(tmp_path / "w.pth", threshold=0.75).threshold == 0.75


def test_arguments_of_a_checkpoint(weights: str) -> None:
    assert load_predictor(weights, precision="bfloat16").precision == "bfloat16"
    assert "threshold 0.1" in repr(load_predictor(weights, threshold=0.1, device="cpu"))
    with pytest.raises(ValueError, match="precision is 'int8'"):
        load_predictor(weights, precision="int8")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device for device 'cuda'"):
            load_predictor(weights, device="cuda")
    with pytest.raises(FileNotFoundError, match=r"gone\.onnx"):
        load_predictor("gone.onnx")


def test_names_of_a_data_set_that_is_not_registered(weights: str, tmp_path: Path) -> None:
    data = torch.load(weights, weights_only=True)
    data["miti_detr"]["class_names"] = ["a", "b", "c"]
    torch.save(data, tmp_path / "w.pth")
    unknown = ("DATASETS.TRAIN", "()", "DATASETS.TEST", "()")
    assert load_predictor(tmp_path / "w.pth", overrides=unknown).class_names == ["a", "b", "c"]


def test_it_is_public() -> None:
    assert "load_predictor" in miti_detr.__all__


def test_without_weights_nothing_is_recorded() -> None:
    assert checkpoint_record(tiny_config("MODEL.WEIGHTS", "")) == {}


def test_test_time_augmentation(weights: str) -> None:
    """One view gives the plain result; a checkpoint whose config has it on is used without."""
    image = noise(60, 120)
    sizes = ("TEST.AUG.MIN_SIZES", "(80,)", "TEST.AUG.MAX_SIZE", "112")
    single = ("TEST.AUG.FLIP", "False")
    options = {"threshold": 0.0, "overrides": (*sizes, *single)}
    plain, one = (load_predictor(weights, tta=x, **options) for x in (False, True))
    wanted, found = (x(image, channels="RGB") for x in (plain, one))
    assert torch.equal(wanted.pred_boxes.tensor, found.pred_boxes.tensor)
    assert torch.equal(wanted.scores, found.scores)
    merged = load_predictor(weights, tta=True, threshold=0.0, overrides=sizes)
    images = [image, np.ascontiguousarray(image[:, ::-1])]
    results = merged(images, channels="RGB")
    assert_close(results[0].scores, results[1].scores, rtol=0, atol=1e-6)
    boxes = results[1].pred_boxes.tensor[:, [2, 1, 0, 3]] * torch.tensor([-1.0, 1, -1, 1])
    shifted = boxes + torch.tensor([120.0, 0, 120, 0])
    assert_close(results[0].pred_boxes.tensor, shifted, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"a\.onnx is an exported model. Test-time augmentation"):
        load_predictor("a.onnx", tta=True)
