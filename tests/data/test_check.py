import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils import comm
from PIL import Image

from miti_detr.data import DetrDatasetMapper, check_datasets, register_coco_format

from .helpers import annotation, coco_content, make_cfg, write_coco


def _register(folder: Path, content: dict[str, Any], *overrides: Any) -> CfgNode:
    """A config that trains on a data set with this content."""
    path = write_coco(folder, content)
    cfg = make_cfg(
        *("DATASETS.COCO_FORMAT", [["pets", str(path), str(folder)]]),
        *("DATASETS.TRAIN", ("pets",), "OUTPUT_DIR", str(folder / "out"), *overrides),
    )
    register_coco_format(cfg)
    return cfg


def test_sound_data_logs_the_mapping(tmp_path: Path, caplog) -> None:
    """Class, id in the data, name, objects; the crowd is not counted."""
    records = [annotation(1, 1), annotation(2, 1, iscrowd=1), annotation(3, 2, category_id=9)]
    with caplog.at_level(logging.INFO):
        check_datasets(_register(tmp_path, coco_content(records)))
    table = caplog.records[-1].getMessage().splitlines()
    assert table[0] == "pets: 2 images, 2 objects"
    assert [line.split() for line in table[-2:]] == [["0", "5", "cat", "1"], ["1", "9", "dog", "1"]]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"bbox": [3, 4, 0, 5]}, "box of zero or negative size"),
        ({"bbox": [3, 4, 5, -1]}, "box of zero or negative size"),
        ({"bbox": [3, 4, math.nan, 5]}, "box is not four finite numbers"),
        ({"bbox": [3, 4, math.inf, 5]}, "box is not four finite numbers"),
        ({"bbox": [3, 4, 5]}, "box is not four finite numbers"),
        ({"bbox": ["3", 4, 5, 6]}, "box is not four finite numbers"),
        ({"bbox": None}, "box is not four finite numbers"),
        ({"bbox": [20, 4, 5, 6]}, "box outside the image"),
        ({"bbox": [-9, 4, 9, 6]}, "box outside the image"),
        ({"bbox": [3, 31, 5, 6]}, "box outside the image"),
        ({"category_id": 7}, "unknown category id"),
        ({"category_id": "6"}, "unknown category id"),
        ({"iscrowd": 2}, "'iscrowd' is neither 0 nor 1"),
        ({"iscrowd": "maybe"}, "'iscrowd' is neither 0 nor 1"),
        ({"bbox": [3, 4, 10**400, 5]}, "box is not four finite numbers"),
        ({"category_id": [5]}, "unknown category id"),
        ({"category_id": None}, "unknown category id"),
        ({"image_id": 12}, "unknown image id"),
        ({"ignore": 1}, "'ignore' is set"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    """Images are 20 x 30; box x 20..25 begins where the image ends."""
    records = [annotation(11, 1), {**annotation(12, 1), **changes}, annotation(13, 2)]
    cfg = _register(tmp_path, coco_content(records))
    with pytest.raises(ValueError, match="1 of 3 annotations") as error:
        check_datasets(cfg)
    message = str(error.value)
    assert str(tmp_path / "truth.json") in message
    assert f"annotation 12, image {changes.get('image_id', 1)}: {fault}" in message
    assert "DATASETS.BAD_ANNOTATIONS drop" in message


def test_a_box_partly_outside_is_sound(tmp_path: Path) -> None:
    check_datasets(_register(tmp_path, coco_content([annotation(1, 1, bbox=[-3, 25, 9, 90])])))


def test_the_first_ten_are_listed(tmp_path: Path) -> None:
    records = [annotation(i, 1, bbox=[1, 1, 0, 0]) for i in range(1, 14)]
    with pytest.raises(ValueError, match="13 of 13") as error:
        check_datasets(_register(tmp_path, coco_content(records)))
    message = str(error.value)
    assert "annotation 10," in message
    assert "annotation 11," not in message
    assert "and 3 more" in message


def test_drop_logs_the_counts(tmp_path: Path, caplog) -> None:
    records = [
        annotation(1, 1),
        annotation(2, 1, bbox=[1, 1, 0, 0]),
        annotation(3, 2, category_id=1),
    ]
    cfg = _register(tmp_path, coco_content(records), "DATASETS.BAD_ANNOTATIONS", "drop")
    with caplog.at_level(logging.INFO):
        check_datasets(cfg)
    assert "2 of 3 annotations are faulty: 1 x unknown category id, 1 x box of zero" in caplog.text
    assert "pets: 2 images, 1 objects" in caplog.text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"images": [\n  1,,\n]}', r"broken JSON: line 2, column 5"),
        ("", r"broken JSON: line 1, column 1"),
        ("[1, 2]", "it holds a list"),
        ('{"images": 3}', "no list 'images'"),
        ('{"images": [], "categories": []}', "the list 'images' is empty"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[" * 200000, "cannot be read as JSON"),
        (b"[" + b"9" * 5000 + b"]", "cannot be read as JSON"),
    ],
)
def test_broken_json(tmp_path: Path, text: str | bytes, match: str) -> None:
    cfg = _register(tmp_path, coco_content([]))
    (tmp_path / "truth.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=match) as error:
        check_datasets(cfg)
    assert str(tmp_path / "truth.json") in str(error.value)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("images", "id"),
        ("images", "file_name"),
        ("images", "width"),
        ("categories", "name"),
        ("categories", "id"),
    ],
)
def test_missing_fields(tmp_path: Path, key: str, field: str) -> None:
    content = coco_content([annotation(1, 1), annotation(2, 1)])
    cfg = _register(tmp_path, content)
    del content[key][1][field]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"entry 1 of '{key}' has no '{field}'"):
        check_datasets(cfg)


def test_other_faults_of_the_file(tmp_path: Path) -> None:
    content = coco_content([annotation(4, 1), annotation(4, 2)])
    cfg = _register(tmp_path, content)
    del content["annotations"]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no 'annotations'"):
        check_datasets(cfg)
    content["images"][0]["height"] = 0
    (tmp_path / "truth.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image 1 has no valid width and height"):
        check_datasets(cfg)
    (tmp_path / "truth.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"truth\.json does not exist"):
        check_datasets(cfg)


@pytest.mark.parametrize("mode", ["error", "drop"])
def test_missing_images(tmp_path: Path, mode: str) -> None:
    cfg = _register(
        tmp_path, coco_content([], ((14, 14), (15, 15), (16, 16))), "DATASETS.BAD_ANNOTATIONS", mode
    )
    (tmp_path / "2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.png$"):
        check_datasets(cfg)
    (tmp_path / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.png \(and 1 more"):
        check_datasets(cfg)


@pytest.mark.parametrize("mode", ["error", "drop"])
def test_images_of_another_size_and_no_images(tmp_path: Path, mode: str) -> None:
    """Detectron2 would stop at them in the middle of the training."""
    cfg = _register(tmp_path, coco_content([], ((4, 6), (5, 5))), "DATASETS.BAD_ANNOTATIONS", mode)
    Image.new("RGB", (6, 4)).save(tmp_path / "1.png")
    with pytest.raises(
        ValueError,
        match=r"truth.json: The image \S*1\.png is 6 x 4 pixels, .* says 4 x 6\. Correct",
    ):
        check_datasets(cfg)
    (tmp_path / "2.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1\.png is 6 x 4 .*and 1 more images\)$"):
        check_datasets(cfg)
    Image.new("RGB", (4, 6)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"The image \S*2\.png cannot be read: its format"):
        check_datasets(cfg)


def test_size_of_an_image_is_the_one_after_its_rotation(tmp_path: Path) -> None:
    """Orientation 6 turns 6 x 4 upright to 4 x 6, as Detectron2's loader does."""
    cfg = _register(tmp_path, coco_content([annotation(1, 1, bbox=[1, 1, 2, 3])], ((4, 6),)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "1.png", exif=exif)
    check_datasets(cfg)
    image = DetrDatasetMapper(cfg, is_train=False)(DatasetCatalog.get("pets")[0])["image"]
    assert image.shape[1] > image.shape[2]


def test_relative_boxes(tmp_path: Path) -> None:
    records = [annotation(i, 1, bbox=[0.1, 0.2, 0.3, 0.4]) for i in (1, 2)]
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        check_datasets(_register(tmp_path, coco_content(records)))


def test_num_classes(tmp_path: Path) -> None:
    cfg = _register(tmp_path, coco_content([annotation(1, 1)]), "MODEL.DETR.NUM_CLASSES", 80)
    with pytest.raises(ValueError, match=r"has 2 classes.* is 80\. .* MODEL.DETR.NUM_CLASSES 2"):
        check_datasets(cfg)


def test_more_objects_than_queries(tmp_path: Path, caplog) -> None:
    """Image 2 has 3 objects and a crowd for 2 queries; image 1 has 2."""
    records = [annotation(i, 1 if i < 3 else 2, iscrowd=int(i == 6)) for i in range(1, 7)]
    cfg = _register(tmp_path, coco_content(records), "MODEL.DETR.NUM_OBJECT_QUERIES", 2)
    check_datasets(cfg)
    assert "1 of 2 images have more objects" in caplog.text
    assert "(image 2: 3)" in caplog.text


def test_validation_data_must_have_the_same_classes(tmp_path: Path) -> None:
    cfg = _register(tmp_path / "train", coco_content([annotation(1, 1)]))
    content = coco_content([annotation(1, 1)])
    content["categories"][0]["name"] = "bird"
    path = write_coco(tmp_path / "val", content)
    cfg.DATASETS.COCO_FORMAT.append(["val", str(path), str(tmp_path / "val")])
    cfg.DATASETS.TEST = ("val",)
    register_coco_format(cfg)
    with pytest.raises(ValueError, match=r"classes of val differ .*'bird'.* against .*'dog'"):
        check_datasets(cfg)
    check_datasets(cfg, eval_only=True)


def test_unregistered_and_empty() -> None:
    with pytest.raises(ValueError, match=r"'nothing' is not registered.*DATASETS.COCO_FORMAT"):
        check_datasets(make_cfg("DATASETS.TRAIN", ("nothing",)))
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN is empty"):
        check_datasets(make_cfg())
    with pytest.raises(ValueError, match=r"DATASETS.TEST is empty"):
        check_datasets(make_cfg(), eval_only=True)


def test_own_function_with_a_flag_that_detectron2_cannot_read(tmp_path: Path) -> None:
    cfg = _own_function(tmp_path, ([2, 3, 8, 9], 0, BoxMode.XYXY_ABS), iscrowd=None)
    with pytest.raises(ValueError, match="1 x 'iscrowd' is neither 0 nor 1"):
        check_datasets(cfg)


def _own_function(
    folder: Path, *boxes: tuple[list[float], int, BoxMode], iscrowd: Any = 0
) -> CfgNode:
    """A config that trains on dicts that a user's own function makes."""
    write_coco(folder, coco_content([]))
    annotations = [
        {"bbox": box, "category_id": label, "bbox_mode": mode, "iscrowd": iscrowd}
        for box, label, mode in boxes
    ]
    record = {"file_name": str(folder / "1.png"), "width": 20, "height": 30, "image_id": 1}
    DatasetCatalog.register("own", lambda: [{**record, "annotations": annotations}])
    MetadataCatalog.get("own").set(thing_classes=["a", "b"])
    return make_cfg("DATASETS.TRAIN", ("own",))


def test_own_function(tmp_path: Path, caplog) -> None:
    """The same box in both modes: x 2..8, y 3..9."""
    sound = [([2, 3, 8, 9], 0, BoxMode.XYXY_ABS), ([2, 3, 6, 6], 1, BoxMode.XYWH_ABS)]
    with caplog.at_level(logging.INFO):
        check_datasets(_own_function(tmp_path, *sound))
    assert "own: 1 images, 2 objects" in caplog.text


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (([8, 3, 2, 9], 0, BoxMode.XYXY_ABS), "zero or negative size"),
        (([2, 3, 8, 9], 2, BoxMode.XYXY_ABS), "unknown category id"),
        (([2, 3, 8, 9], -1, BoxMode.XYXY_ABS), "unknown category id"),
        (([2, 3, 8, 9], 0, BoxMode.XYXY_REL), "not four finite numbers"),
    ],
)
def test_own_function_with_faults(tmp_path: Path, bad: Any, fault: str) -> None:
    cfg = _own_function(tmp_path, ([2, 3, 8, 9], 0, BoxMode.XYXY_ABS), bad)
    with pytest.raises(ValueError, match=rf"data set own: 1 of 2 .*{fault}") as error:
        check_datasets(cfg)
    assert "1.png" in str(error.value)


def test_faults_that_only_our_registration_can_drop(tmp_path: Path) -> None:
    """Detectron2's loader stops at an unknown category before anything could drop it."""
    path = write_coco(tmp_path, coco_content([annotation(1, 1, category_id=6)]))
    MetadataCatalog.get("foreign").set(
        json_file=str(path), image_root=str(tmp_path), evaluator_type="coco"
    )
    DatasetCatalog.register("foreign", list)
    cfg = make_cfg("DATASETS.TRAIN", ("foreign",), "DATASETS.BAD_ANNOTATIONS", "drop")
    with pytest.raises(ValueError, match=r"that DATASETS.COCO_FORMAT registers"):
        check_datasets(cfg)


@pytest.mark.parametrize(
    ("changes", "tested", "needed"),
    [
        ({}, True, ""),
        ({"area": "x", "id": 0}, False, ""),
        ({"area": "x"}, True, "1 x 'area'"),
        ({"id": 0}, True, "1 x annotation 'id'"),
        ({"iscrowd": "0"}, False, "1 x 'iscrowd'"),
        ({"segmentation": [[1, 2, 3, 4]]}, False, "1 x 'segmentation' without a polygon"),
    ],
)
def test_what_detectron2_reads_itself_must_need_no_repair(
    tmp_path: Path, changes: dict[str, Any], tested: bool, needed: str
) -> None:
    """Of data sets that a user registered with ``register_coco_instances``."""
    content = coco_content([annotation(1, 1), {**annotation(2, 2), **changes}])
    register_coco_instances("foreign", {}, str(write_coco(tmp_path, content)), str(tmp_path))
    cfg = make_cfg("DATASETS.TRAIN", ("foreign",))
    cfg.DATASETS.TEST = ("foreign",) if tested else ()
    if not needed:
        check_datasets(cfg)
        return
    with pytest.raises(ValueError, match=rf"needs repairs \({needed}\).*DATASETS.COCO_FORMAT"):
        check_datasets(cfg)


def test_exif_orientation(tmp_path: Path) -> None:
    """The message says which setting fits; then the image is read so."""
    record = annotation(1, 1, bbox=[1, 1, 3, 2])
    cfg = _register(tmp_path, coco_content([record], ((6, 4),)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "1.png", exif=exif)
    with pytest.raises(ValueError, match=r"override DATASETS.EXIF_ORIENTATION ignore$"):
        check_datasets(cfg)
    cfg.DATASETS.EXIF_ORIENTATION = "ignore"
    check_datasets(cfg)
    mapped = DetrDatasetMapper(cfg, is_train=True)(DatasetCatalog.get("pets")[0])
    assert (mapped["width"], mapped["height"]) == (6, 4)


def test_bad_images_are_counted_where_they_are_skipped(tmp_path: Path, caplog) -> None:
    records = [annotation(1, 1), annotation(2, 2)]
    cfg = _register(tmp_path, coco_content(records), "DATASETS.BAD_IMAGES", "skip")
    (tmp_path / "1.png").unlink()
    check_datasets(cfg)
    assert "1 of 2 images checked will be skipped" in caplog.text
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no image that can be used"):
        check_datasets(cfg)


def test_repairs_are_counted(tmp_path: Path, caplog) -> None:
    records = [annotation(1, 1, area=-4), {**annotation(2, 2), "iscrowd": None, "id": "b"}]
    check_datasets(_register(tmp_path, coco_content(records)))
    assert "repaired 1 x annotation 'id', 1 x 'iscrowd', 1 x 'area'" in caplog.text


def test_other_processes_raise_what_the_main_one_found(monkeypatch) -> None:
    error = ValueError("found by the main process")
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "all_gather", lambda mine: [error, mine])
    with pytest.raises(ValueError, match="found by the main process"):
        check_datasets(make_cfg("DATASETS.TRAIN", ("nothing",)))


def test_many_classes_stand_side_by_side(tmp_path: Path, caplog) -> None:
    content = coco_content([annotation(1, 1)])
    content["categories"] = [{"id": i, "name": f"c{i}"} for i in range(1, 32)]
    with caplog.at_level(logging.INFO):
        check_datasets(_register(tmp_path, content, "MODEL.DETR.NUM_CLASSES", 31))
    rows = caplog.records[-1].getMessage().splitlines()[3:]
    assert len(rows) == 11
    assert rows[0].split() == ["0", "1", "c1", "0", "11", "12", "c12", "0", "22", "23", "c23", "0"]
