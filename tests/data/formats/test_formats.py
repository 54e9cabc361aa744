"""The same images in every layout give the same boxes; what cannot be read is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from miti_detr.data.coco.coco_file import read_coco_file
from miti_detr.data.formats import find_data, write_coco_files

NAMES = ("cat", "dog", "owl")
BOXES = {  # of each image: class and xywh in whole pixels, as VOC has them
    "a": ((0, (3, 5, 20, 11)), (2, (0, 0, 40, 30))),
    "b": ((1, (39, 29, 1, 1)),),
    "c": (),
    "d": ((0, (1, 2, 3, 4)), (0, (10, 12, 14, 16)), (1, (20, 3, 19, 26))),
}
PARTS = {"train": ("a", "b", "c"), "val": ("d",)}
SIZE = (40, 30)
Write = Callable[[Path], Path]


def _image(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return f"{name}.png"


def _content(names: tuple[str, ...]) -> dict[str, Any]:
    images = [
        {"id": i, "file_name": f"{name}.png", "width": SIZE[0], "height": SIZE[1]}
        for i, name in enumerate(names)
    ]
    annotations = [
        {"image_id": i, "category_id": label, "bbox": list(box), "area": box[2] * box[3]}
        for i, name in enumerate(names)
        for label, box in BOXES[name]
    ]
    annotations = [{"id": i, "iscrowd": 0, **each} for i, each in enumerate(annotations)]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _coco(folder: Path) -> Path:
    for part, names in PARTS.items():
        (folder / f"{part}.json").write_text(json.dumps(_content(names)))
        for name in names:
            _image(folder / "images", name)
    return folder


def _coco_2017(folder: Path) -> Path:
    (folder / "annotations").mkdir()
    for part, names in PARTS.items():
        file = folder / "annotations" / f"instances_{part}2017.json"
        file.write_text(json.dumps(_content(names)))
        for name in names:
            _image(folder / f"{part}2017", name)
    return folder


def _roboflow(folder: Path) -> Path:
    for part, names in zip(("train", "valid"), PARTS.values(), strict=True):
        for name in names:
            _image(folder / part, name)
        (folder / part / "_annotations.coco.json").write_text(json.dumps(_content(names)))
    return folder


def _yolo_rows(name: str, *, polygons: bool = False) -> str:
    rows = []
    for label, (x, y, w, h) in BOXES[name]:
        if polygons:
            corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h))
            numbers = [n for px, py in corners for n in (px / SIZE[0], py / SIZE[1])]
        else:
            numbers = [(x + w / 2) / SIZE[0], (y + h / 2) / SIZE[1], w / SIZE[0], h / SIZE[1]]
        rows.append(" ".join([str(label), *(f"{n:.8f}" for n in numbers)]))
    return "\n".join(rows)


def _yolo(folder: Path) -> Path:
    """Ultralytics' layout; names by index, and no file for an image without objects."""
    for part, names in PARTS.items():
        (folder / "labels" / part).mkdir(parents=True)
        for name in names:
            _image(folder / "images" / part, name)
            if BOXES[name]:
                (folder / "labels" / part / f"{name}.txt").write_text(_yolo_rows(name))
    named = "".join(f"  {i}: {name}\n" for i, name in enumerate(NAMES))
    text = f"path: .\ntrain: images/train\nval: images/val\nnames:\n{named}"
    (folder / "data.yaml").write_text(text)
    return folder


def _yolo_of_roboflow(folder: Path) -> Path:
    """Paths that start one folder too high, a list of names, polygons."""
    for part, names in zip(("train", "valid"), PARTS.values(), strict=True):
        (folder / part / "labels").mkdir(parents=True)
        for name in names:
            _image(folder / part / "images", name)
            rows = _yolo_rows(name, polygons=True)
            (folder / part / "labels" / f"{name}.txt").write_text(rows)
    text = f"train: ../train/images\nval: ../valid/images\nnc: 3\nnames: {list(NAMES)}\n"
    (folder / "data.yaml").write_text(text)
    return folder


def _voc_file(file: Path, name: str) -> None:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{name}.png"
    for label, (x, y, w, h) in BOXES[name]:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = NAMES[label]
        box = ElementTree.SubElement(element, "bndbox")
        corners = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
        for key, value in corners.items():
            ElementTree.SubElement(box, key).text = str(value)
    file.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(file)


def _voc(folder: Path) -> Path:
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for part, names in PARTS.items():
        (lists / f"{part}.txt").write_text("\n".join(names))
        for name in names:
            _image(folder / "JPEGImages", name)
            _voc_file(folder / "Annotations" / f"{name}.xml", name)
    return folder


def _voc_of_roboflow(folder: Path) -> Path:
    for part, names in zip(("train", "valid"), PARTS.values(), strict=True):
        for name in names:
            _image(folder / part, name)
            _voc_file(folder / part / f"{name}.xml", name)
    return folder


def _boxes(parts: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Of each part: image, class and box in whole pixels; the images exist."""
    found = {}
    for part, (file, root) in parts.items():
        data = read_coco_file(file, root)
        names = data.classes
        found[part] = {
            Path(record["file_name"]).name: sorted(
                (names[a["category_id"]], tuple(round(n, 4) for n in a["bbox"]))
                for a in record["annotations"]
            )
            for record in data.to_dicts(root)
        }
        assert all(Path(record["file_name"]).is_file() for record in data.to_dicts(root))
    return found


@pytest.mark.parametrize(
    "write", [_coco, _coco_2017, _roboflow, _yolo, _yolo_of_roboflow, _voc, _voc_of_roboflow]
)
def test_all_layouts_give_the_same_boxes(write: Write, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = write(tmp_path / "data")
    parts = write_coco_files(find_data(data), tmp_path / "made")
    expected = {
        part: {
            f"{name}.png": sorted(
                (NAMES[label], tuple(float(n) for n in box)) for label, box in BOXES[name]
            )
            for name in names
        }
        for part, names in PARTS.items()
    }
    assert _boxes(parts) == expected


@pytest.mark.parametrize("write", [_coco, _yolo, _voc])
def test_without_a_validation_part_images_are_taken_for_it(write: Write, tmp_path: Path) -> None:
    """A fifth, always the same; converted again only if the labels have changed."""
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    for leftover in (data / "val.json", data / "ImageSets"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    if (data / "data.yaml").is_file():
        text = (data / "data.yaml").read_text().replace("val: images/val\n", "")
        (data / "data.yaml").write_text(text)
    parts = write_coco_files(find_data(data), tmp_path / "made")
    found = _boxes(parts)
    assert len(found["val"]) == 1
    assert len(found["train"]) >= 2
    assert not found["train"].keys() & found["val"].keys()
    times = [Path(file).stat().st_mtime_ns for file, _ in parts.values()]
    assert write_coco_files(find_data(data), tmp_path / "made") == parts
    assert [Path(file).stat().st_mtime_ns for file, _ in parts.values()] == times
    assert _boxes(write_coco_files(find_data(data), tmp_path / "b")) == found
    labels = find_data(data).labels[-1]
    labels.write_text(labels.read_text() + "\n")
    write_coco_files(find_data(data), tmp_path / "made")
    assert [Path(file).stat().st_mtime_ns for file, _ in parts.values()] != times


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0 0.5 0.5 x 0.1", "a.txt, line 3: '0 0.5 0.5 x 0.1' is not a row of numbers"),
        ("3 0.5 0.5 0.1 0.1", "line 3: class 3 is not one of the 3 classes"),
        ("0.5 0.5 0.5 0.1 0.1", "line 3: class 0.5 is not one"),
        ("0 0.5 0.5 0.1 0.1 0.9", "line 3: a row has a class and 4 numbers"),
    ],
)
def test_faulty_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    _yolo(tmp_path)
    file = tmp_path / "labels" / "train" / "a.txt"
    file.write_text(f"{file.read_text()}\n{row}\n")
    with pytest.raises(ValueError, match=message):
        write_coco_files(find_data(tmp_path), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation>", "is not XML"),
        ("<annotation><object><name>a</name></object></annotation>", "needs a name and a bndbox"),
        (
            "<annotation><object><name>a</name><bndbox><xmin>1</xmin></bndbox></object></annotation>",
            "the bndbox of 'a' needs four numbers",
        ),
        ("<annotation><filename>q.png</filename></annotation>", "its image q.png is not in"),
    ],
)
def test_faulty_xml_is_named(tmp_path: Path, text: str, message: str) -> None:
    _voc(tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    if "q.png" in text:
        (tmp_path / "JPEGImages" / "a.png").unlink()
    with pytest.raises((ValueError, OSError), match=message):
        write_coco_files(find_data(tmp_path), tmp_path / "made")


def test_what_is_not_recognised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_data(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no labelled data that is known"):
        find_data(tmp_path)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="neither a COCO JSON file nor"):
        find_data(tmp_path / "a.txt")
    _coco(tmp_path)
    _voc(tmp_path)
    with pytest.raises(ValueError, match="holds COCO and Pascal VOC"):
        find_data(tmp_path)
    assert find_data(tmp_path / "train.json").kind == "COCO"
    shutil.rmtree(tmp_path / "images")
    shutil.rmtree(tmp_path / "JPEGImages")
    with pytest.raises(ValueError, match=r"its image a\.png is not in"):
        write_coco_files(find_data(tmp_path / "train.json"), tmp_path / "made")
