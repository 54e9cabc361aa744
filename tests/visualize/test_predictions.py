import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from miti_detr.engine.predictor import Predictor
from miti_detr.visualize.classes import ClassTable
from miti_detr.visualize.predictions import find_images, picture_paths, predict_images

CLASSES = ClassTable(["cat", "dog"], [17, 18])


def make_image(path: Path, width: int = 40, height: int = 30, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (10, 200, 30)).save(path, **options)
    return path


def test_a_folder_contributes_its_images(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "deep/c.png"):
        make_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    named = tmp_path / "a.png"
    assert find_images([named, tmp_path, tmp_path / "gone.png"]) == [
        named,
        tmp_path / "b.JPG",
        tmp_path / "gone.png",
    ]


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no images in {tmp_path}"):
        find_images([tmp_path])


def test_pictures_do_not_overwrite_each_other() -> None:
    images = [Path(p) for p in ("a/x.jpg", "b/x.jpg", "c/X.jpg", "a/x_2.jpg", "x.webp", "x.png")]
    names = [path.name for path in picture_paths(images, Path("out"))]
    assert names == ["x.jpg", "x_2.jpg", "X_3.jpg", "x_2_2.jpg", "x.png", "x_2.png"]
    assert len({name.lower() for name in names}) == len(names)


def test_pictures_do_not_overwrite_the_images(tmp_path: Path) -> None:
    image = make_image(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg is one of the images"):
        picture_paths([image], tmp_path / ".")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predictions(tmp_path: Path, predictor: Predictor, batch_size: int) -> None:
    """The stand-in finds class 1 in the left half: (0, 0, w/2, h) with score 0.9, above 0.5."""
    images = [
        make_image(tmp_path / "in/tall.png", 20, 50),
        make_image(tmp_path / "in/wide.jpg", 400, 100),
        make_image(tmp_path / "in/square.bmp", 30, 30),
    ]
    done: list[int] = []
    summary = predict_images(
        predictor,
        images,
        tmp_path / "out",
        classes=CLASSES,
        batch_size=batch_size,
        advance=done.append,
    )
    assert sum(done) == 3
    assert [path.name for path in summary.pictures] == ["tall.png", "wide.jpg", "square.png"]
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert results == summary.results
    assert [(r["image_id"], r["file_name"], r["bbox"]) for r in results] == [
        (1, str(images[0]), [0, 0, 10, 50]),
        (2, str(images[1]), [0, 0, 200, 100]),
        (3, str(images[2]), [0, 0, 15, 30]),
    ]
    assert {(r["category_id"], r["score"]) for r in results} == {(18, 0.9)}
    sizes = [Image.open(path).size for path in summary.pictures]
    assert sizes == [(128, 320), (400, 100), (320, 320)]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_nothing_above_the_threshold(tmp_path: Path, predictor: Predictor) -> None:
    images = [make_image(tmp_path / "a.png")]
    summary = predict_images(predictor, images, tmp_path / "out", classes=CLASSES, threshold=0.95)
    assert summary.results == []
    assert (tmp_path / "out/predictions.json").read_text() == "[]"
    assert Image.open(tmp_path / "out/a.png").getcolors() == [(320 * 240, (10, 200, 30))]


def test_unreadable_files_are_named_and_skipped(tmp_path: Path, predictor: Predictor) -> None:
    whole = make_image(tmp_path / "whole.png", 200, 200)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:90])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    images = [cut, text, whole, tmp_path / "gone.png"]
    summary = predict_images(predictor, images, tmp_path / "out", classes=CLASSES, batch_size=4)
    assert [path.name for path, _ in summary.skipped] == ["cut.png", "text.jpg", "gone.png"]
    assert all(reason for _, reason in summary.skipped)
    assert [path.name for path in summary.pictures] == ["whole.png"]
    assert [result["image_id"] for result in summary.results] == [3]


def test_exif_rotation_is_respected(tmp_path: Path, predictor: Predictor) -> None:
    """Orientation 6 turns 40x30 upright to 30x40: the left half is 15x40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = make_image(tmp_path / "turned.jpg", exif=exif)
    summary = predict_images(predictor, [image], tmp_path / "out", classes=CLASSES)
    assert summary.results[0]["bbox"] == [0, 0, 15, 40]
    assert Image.open(summary.pictures[0]).size == (240, 320)


def test_grey_and_transparent_images(tmp_path: Path, predictor: Predictor) -> None:
    images = []
    for mode in ("L", "RGBA", "P", "1", "LA"):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (50, 40)).save(path)
        images.append(path)
    summary = predict_images(predictor, images, tmp_path / "out", classes=CLASSES, batch_size=2)
    assert len(summary.pictures) == 5
    assert np.asarray(Image.open(summary.pictures[0])).shape == (256, 320, 3)
