import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from miti_detr.predict import DetectionPredictor, Found
from miti_detr.predict.job import JOURNAL, picture_paths, predict_files
from miti_detr.predict.sources import find_images
from tests.predict.conftest import FixedBackend


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


def test_lists_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jpg", "a.png", "deep/c.png", "[1].png"):
        make_image(tmp_path / name)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{tmp_path}/b.jpg\n\nother.png\r\n"))
    assert find_images(["-"]) == [tmp_path / "b.jpg", Path("other.png")]
    found = find_images([f"{tmp_path}/**/*.png"])
    assert [path.name for path in found] == ["[1].png", "a.png", "c.png"]
    assert find_images([tmp_path / "[1].png"]) == [tmp_path / "[1].png"]
    (tmp_path / "film.mp4").touch()
    assert len(find_images([tmp_path], films=True)) == len(find_images([tmp_path])) + 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predictions(tmp_path: Path, batch_size: int) -> None:
    """The stand-in finds class 1 in the left half: (0, 0, w/2, h) with score 0.9, above 0.5."""
    images = [
        make_image(tmp_path / "in/tall.png", 20, 50),
        make_image(tmp_path / "in/wide.jpg", 400, 100),
        make_image(tmp_path / "in/square.bmp", 30, 30),
    ]
    done: list[int] = []
    predictor = DetectionPredictor(FixedBackend(), batch_size=batch_size)
    summary = predict_files(predictor, images, tmp_path / "out", advance=done.append)
    assert sum(done) == summary.done == summary.detections == 3
    assert summary.output == tmp_path / "out/predictions.json"
    results = json.loads(summary.output.read_text())
    assert [(r["image_id"], r["file_name"], r["bbox"]) for r in results] == [
        (1, str(images[0]), [0, 0, 10, 50]),
        (2, str(images[1]), [0, 0, 200, 100]),
        (3, str(images[2]), [0, 0, 15, 30]),
    ]
    assert {(r["category_id"], r["score"]) for r in results} == {(18, 0.9)}
    names = ("tall.png", "wide.jpg", "square.png")
    sizes = [Image.open(tmp_path / "out" / name).size for name in names]
    assert sizes == [(128, 320), (400, 100), (320, 320)]
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_nothing_above_the_threshold(tmp_path: Path) -> None:
    images = [make_image(tmp_path / "a.png")]
    predictor = DetectionPredictor(FixedBackend(), threshold=0.95)
    predict_files(predictor, images, tmp_path / "out")
    assert (tmp_path / "out/predictions.json").read_text() == "[]"
    assert Image.open(tmp_path / "out/a.png").getcolors() == [(320 * 240, (10, 200, 30))]


def test_unreadable_files_are_named_and_skipped(
    tmp_path: Path, predictor: DetectionPredictor
) -> None:
    whole = make_image(tmp_path / "whole.png", 200, 200)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:90])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    images = [cut, text, whole, tmp_path / "gone.png"]
    summary = predict_files(predictor, images, tmp_path / "out")
    assert [Path(file).name for file, _ in summary.failed] == ["cut.png", "text.jpg", "gone.png"]
    assert (tmp_path / "out/errors.txt").read_text().count("\n") == 3
    (result,) = json.loads(summary.output.read_text())
    assert result["image_id"] == 3
    make_image(text)  # repaired
    summary = predict_files(predictor, images[1:3], tmp_path / "out")
    assert summary.done == 2
    assert not (tmp_path / "out/errors.txt").exists()


class RefusesSome(FixedBackend):
    """Fails for batches with an image that is 31 pixels wide."""

    def detect(self, items: Sequence[dict[str, Any]]) -> list[Found]:
        if any(item["width"] == 31 for item in items):
            raise ValueError("the prediction is NaN")
        return super().detect(items)


def test_a_failing_prediction_fails_one_image(tmp_path: Path) -> None:
    images = [make_image(tmp_path / f"{width}.png", width) for width in (30, 31, 32)]
    predictor = DetectionPredictor(RefusesSome())
    summary = predict_files(predictor, images, tmp_path / "out", draw=False)
    assert summary.failed == [(str(images[1]), "the prediction is NaN")]
    assert summary.done == 2
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == []


class Killed(BaseException):
    pass


def test_a_killed_job_is_continued(tmp_path: Path) -> None:
    """Nothing is lost and nothing is predicted twice, wherever the journal was cut off."""
    images = [make_image(tmp_path / f"in/{index:02}.png", 20 + index) for index in range(20)]
    wanted = predict_files(DetectionPredictor(FixedBackend()), images, tmp_path / "whole")
    backend = FixedBackend()
    predictor = DetectionPredictor(backend, batch_size=1)
    seen = 0

    def kill(count: int) -> None:
        nonlocal seen
        seen += count
        if seen >= 8:
            raise Killed

    with pytest.raises(Killed):
        predict_files(predictor, images, tmp_path / "out", draw=False, advance=kill)
    journal = tmp_path / "out" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-3])  # killed while it wrote the last line
    before = journal.read_text().count("\n") - 1
    assert before == 7
    with pytest.raises(ValueError, match="unfinished job with pictures False, not True"):
        predict_files(predictor, images, tmp_path / "out")
    backend = FixedBackend()  # threads of the first job may still use the other one
    predictor = DetectionPredictor(backend, batch_size=1)
    summary = predict_files(predictor, images, tmp_path / "out", draw=False)
    assert (summary.resumed, summary.done) == (7, 20)
    assert len(backend.batches) == 13
    assert summary.output.read_text() == wanted.output.read_text()
    assert not journal.exists()


def test_formats(tmp_path: Path, predictor: DetectionPredictor) -> None:
    images = [make_image(tmp_path / "a.png", 40, 30), make_image(tmp_path / "b.png", 20, 30)]
    out = tmp_path / "out"
    predict_files(predictor, images, out, format="csv", draw=False)
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == [str(image) for image in images]
    assert rows[0]["category"] == "dog"
    assert [float(rows[0][key]) for key in ("x", "y", "width", "height")] == [0, 0, 20, 30]
    predict_files(predictor, images, out, format="jsonl", draw=False)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [1, 2]
    assert lines[1]["width"] == 20
    assert lines[1]["detections"][0]["category"] == "dog"
    predict_files(predictor, images, out, format="yolo", draw=False)
    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    assert (out / "labels/b.txt").read_text().split() == [
        "1", "0.250000", "0.500000", "0.500000", "1.000000", "0.900000"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="format is 'xml'"):
        predict_files(predictor, images, out, format="xml")


def test_exif_rotation_is_respected(tmp_path: Path, predictor: DetectionPredictor) -> None:
    """Orientation 6 turns 40x30 upright to 30x40: the left half is 15x40."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = make_image(tmp_path / "turned.jpg", exif=exif)
    summary = predict_files(predictor, [image], tmp_path / "out")
    assert json.loads(summary.output.read_text())[0]["bbox"] == [0, 0, 15, 40]
    assert Image.open(tmp_path / "out/turned.jpg").size == (240, 320)


def test_grey_and_transparent_images(tmp_path: Path, predictor: DetectionPredictor) -> None:
    images = []
    for mode in ("L", "RGBA", "P", "1", "LA"):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (50, 40)).save(path)
        images.append(path)
    assert predict_files(predictor, images, tmp_path / "out").done == 5
    assert np.asarray(Image.open(tmp_path / "out/L.png")).shape == (256, 320, 3)
