import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from miti_detr.data import DetrDatasetMapper, build_augmentations
from miti_detr.data.resize import FastResizeShortestEdge

from .helpers import make_cfg

SMALL = ("INPUT.MIN_SIZE_TRAIN", (48, 64), "INPUT.MAX_SIZE_TRAIN", 100, "INPUT.MIN_SIZE_TEST", 40)
CROP = (
    *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", [20, 40]),
    *("INPUT.CROP.MIN_SIZE_BEFORE", (40, 50)),
)


def _record(
    folder: Path, boxes: list[list[float]], height: int = 60, width: int = 80, **extra: Any
) -> dict[str, Any]:
    """A dataset dict with a random image and boxes in xywh of classes 0, 1, 0, ..."""
    path = folder / "image.png"
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": i % 2, "iscrowd": 0}
        for i, box in enumerate(boxes)
    ]
    record = {"file_name": str(path), "image_id": 3, "height": height, "width": width}
    return {**record, "annotations": annotations, **extra}


def _boxes(output: dict[str, Any]) -> torch.Tensor:
    return output["instances"].gt_boxes.tensor


def test_output_in_training(tmp_path: Path) -> None:
    record = _record(tmp_path, [[10, 20, 30, 15]])
    before = json.dumps(record)
    output = DetrDatasetMapper(make_cfg(*SMALL), is_train=True)(record)
    assert json.dumps(record) == before
    assert set(output) == {"file_name", "image_id", "height", "width", "image", "instances"}
    image = output["image"]
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert image.shape[0] == 3
    assert min(image.shape[1:]) in (48, 64)
    assert output["instances"].image_size == tuple(image.shape[1:])
    assert output["instances"].gt_classes.dtype == torch.int64
    assert (output["height"], output["width"]) == (60, 80)


def test_output_in_inference(tmp_path: Path) -> None:
    """40 pixels of the shorter side: 60 x 80 becomes 40 x int(80 * 40 / 60 + 0.5) = 40 x 53."""
    output = DetrDatasetMapper(make_cfg(*SMALL, *CROP), is_train=False)(_record(tmp_path, []))
    assert set(output) == {"file_name", "image_id", "height", "width", "image"}
    assert output["image"].shape == (3, 40, 53)


def test_format_decides_the_order_of_channels(tmp_path: Path) -> None:
    record = _record(tmp_path, [])
    rgb, bgr = (
        DetrDatasetMapper(make_cfg(*SMALL, "INPUT.FORMAT", f), is_train=False)(record)["image"]
        for f in ("RGB", "BGR")
    )
    assert torch.equal(rgb, bgr.flip(0))
    assert not torch.equal(rgb, bgr)


def test_flip_moves_boxes(tmp_path: Path) -> None:
    """A flip takes x0..x1 to W - x1..W - x0. Without a resize: x 10..40 of 80 becomes 40..70."""
    mapper = DetrDatasetMapper(
        is_train=True, augmentations=[T.RandomFlip(prob=1.0)], image_format="RGB"
    )
    output = mapper(_record(tmp_path, [[10, 20, 30, 15]]))
    torch.testing.assert_close(_boxes(output), torch.tensor([[40.0, 20, 70, 35]]), rtol=0, atol=0)
    plain = np.asarray(Image.open(tmp_path / "image.png"))
    np.testing.assert_array_equal(output["image"].permute(1, 2, 0).numpy(), plain[:, ::-1])


def test_crowds_and_empty_boxes_are_left_out_and_boxes_clipped(tmp_path: Path) -> None:
    """Image 80 x 60: the second box reaches out on the right, the third lies outside."""
    record = _record(tmp_path, [[1, 2, 3, 4], [70, 10, 30, 5], [90, 10, 5, 5], [5, 5, 9, 9]])
    record["annotations"][3]["iscrowd"] = 1
    mapper = DetrDatasetMapper(is_train=True, augmentations=[], image_format="RGB")
    output = mapper(record)
    expected = torch.tensor([[1.0, 2, 4, 6], [70, 10, 80, 15]])
    torch.testing.assert_close(_boxes(output), expected, rtol=0, atol=0)
    assert output["instances"].gt_classes.tolist() == [0, 1]


@pytest.fixture
def always_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miti_detr.data.mapper.CROP_PROBABILITY", 1.0)


@pytest.mark.parametrize("with_key", [True, False])
def test_image_without_objects_is_kept(tmp_path: Path, with_key: bool, always_crop: None) -> None:
    record = _record(tmp_path, [])
    if not with_key:
        del record["annotations"]
    output = DetrDatasetMapper(make_cfg(*SMALL, *CROP), is_train=True)(record)
    assert len(output["instances"]) == 0
    assert _boxes(output).shape == (0, 4)
    assert output["instances"].gt_classes.dtype == torch.int64


def test_crop_that_removes_every_box(tmp_path: Path) -> None:
    """The crop of the upper left 10 x 10 pixels leaves out a box at 40..50."""
    crop = T.CropTransform(0, 0, 10, 10)
    mapper = DetrDatasetMapper(is_train=True, augmentations=[crop], image_format="RGB")
    output = mapper(_record(tmp_path, [[40, 40, 10, 10]]))
    assert output["image"].shape == (3, 10, 10)
    assert _boxes(output).shape == (0, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(20, 2000), (2000, 20), (1, 1), (4, 300)])
def test_extreme_sizes(tmp_path: Path, height: int, width: int, always_crop: None) -> None:
    record = _record(tmp_path, [[0, 0, width, height]], height, width)
    np.random.seed(0)
    output = DetrDatasetMapper(make_cfg(*SMALL, *CROP), is_train=True)(record)
    assert max(output["image"].shape[1:]) <= 100
    assert len(output["instances"]) == 1
    assert torch.isfinite(_boxes(output)).all()


def test_image_too_thin_to_resize_is_named(tmp_path: Path) -> None:
    """5000 x 1 at a longest side of 1333 would be 0.27 pixels high."""
    record = _record(tmp_path, [], 1, 5000)
    with pytest.raises(OSError, match=r"image\.png .*: it is 5000 x 1 pixels"):
        DetrDatasetMapper(make_cfg(), is_train=False)(record)


@pytest.mark.parametrize("crop", [(), CROP])
def test_equals_the_path_of_detectron2(tmp_path: Path, crop: tuple[Any, ...]) -> None:
    """Same draws, then box by box through Detectron2's own functions.

    It converts xywh in float32, here float64: up to 1e-7 of a coordinate of some hundred pixels.
    """
    rng = np.random.RandomState(1)
    mapper = DetrDatasetMapper(make_cfg(*SMALL, *crop), is_train=True)
    removed = 0
    for seed in range(30):
        corners, sides = rng.uniform(-5, 75, (7, 2)), rng.uniform(0.5, 40, (7, 2))
        record = _record(tmp_path, np.hstack([corners, sides]).tolist())
        record["annotations"][2]["iscrowd"] = 1
        if seed % 3 == 0:
            record["annotations"][1].update(bbox=[3.0, 4.0, 9.5, 8.0], bbox_mode=BoxMode.XYXY_ABS)
        np.random.seed(seed)
        output = mapper(record)
        np.random.seed(seed)
        image = T.AugInput(utils.read_image(record["file_name"], "BGR"))
        transforms = mapper.augmentations(image)
        size = image.image.shape[:2]
        annotations = [
            utils.transform_instance_annotations(dict(a), transforms, size)
            for a in record["annotations"]
            if not a["iscrowd"]
        ]
        expected = utils.filter_empty_instances(utils.annotations_to_instances(annotations, size))
        torch.testing.assert_close(_boxes(output), expected.gt_boxes.tensor, rtol=1e-6, atol=1e-4)
        assert torch.equal(output["instances"].gt_classes, expected.gt_classes)
        np.testing.assert_array_equal(output["image"].permute(1, 2, 0).numpy(), image.image)
        removed += 6 - len(expected)
    assert removed > 0


def test_recipe_of_the_published_wrapper() -> None:
    """Flip 0.5; with probability 0.5 resize to 400, 500 or 600 and crop 384..600; final resize."""
    sizes = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    flip, crop, resize = build_augmentations(
        make_cfg(
            *("INPUT.MIN_SIZE_TRAIN", sizes, "INPUT.CROP.ENABLED", True),
            *("INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", [384, 600]),
        ),
        is_train=True,
    )
    assert isinstance(flip, T.RandomFlip)
    assert flip.prob == 0.5
    assert isinstance(crop, T.RandomApply)
    assert crop.prob == 0.5
    first, second = crop.aug.augs
    assert tuple(first.short_edge_length) == (400, 500, 600)
    assert first.max_size > 10**6
    assert (second.crop_type, tuple(second.crop_size)) == ("absolute_range", (384, 600))
    assert (tuple(resize.short_edge_length), resize.max_size, resize.is_range) == (
        sizes,
        1333,
        False,
    )


def test_keys_are_respected() -> None:
    augmentations = build_augmentations(
        make_cfg("INPUT.RANDOM_FLIP", "none", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", *SMALL[:4]),
        is_train=True,
    )
    assert [type(a) for a in augmentations] == [FastResizeShortestEdge]
    assert augmentations[0].is_range
    with pytest.raises(ValueError, match=r"INPUT\.RANDOM_FLIP must be one of"):
        build_augmentations(make_cfg("INPUT.RANDOM_FLIP", "both"), is_train=True)


@pytest.mark.parametrize("key", ["KEYPOINT_ON", "LOAD_PROPOSALS"])
def test_other_tasks_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"MODEL\.{key} is True"):
        DetrDatasetMapper(make_cfg(f"MODEL.{key}", True), is_train=True)


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    mapper = DetrDatasetMapper(make_cfg(*SMALL), is_train=True)
    record = _record(tmp_path, [])
    path = Path(record["file_name"])
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(OSError, match=r"image .*image\.png cannot be read: .*truncated"):
        mapper(record)
    path.write_bytes(b"no image")
    with pytest.raises(OSError, match=r"image .*image\.png cannot be read: its format"):
        mapper(record)
    path.unlink()
    with pytest.raises(OSError, match=r"image .*image\.png does not exist"):
        mapper(record)


def test_wrong_size_is_named(tmp_path: Path) -> None:
    record = _record(tmp_path, [], width=80)
    record["width"] = 81
    with pytest.raises(OSError, match=r"image\.png is 80 x 60 pixels, .* says 81 x 60"):
        DetrDatasetMapper(make_cfg(*SMALL), is_train=True)(record)
