import hashlib
import json
import logging
import multiprocessing
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils

from miti_detr.data import render_shapes, shapes
from miti_detr.data.coco_format import prepare_files

COUNTS = (12, 5)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root") / "shapes"
    render_shapes(folder, *COUNTS)
    return folder


def test_json_is_pinned(rendered: Path) -> None:
    digests = [
        # The file names ended in .bmp when these were computed.
        hashlib.sha256(
            (rendered / f"{split}.json").read_bytes().replace(b".png", b".bmp")
        ).hexdigest()
        for split in ("train", "val")
    ]
    assert digests == [
        "b6e7c40aaaffd26e9caf74d040eaaf75bca0e63de2f4f2a7c735300999717481",
        "34cd2e9a6099982dcabd03bf33ca39c0cba40fc87aae860389bd5b600c0ecc59",
    ]


def test_files(rendered: Path) -> None:
    for split, count in zip(("train", "val"), COUNTS, strict=True):
        content = json.loads((rendered / f"{split}.json").read_text())
        names = [image["file_name"] for image in content["images"]]
        assert names == [f"{i:06d}.png" for i in range(1, count + 1)]
        assert sorted(p.name for p in (rendered / split).iterdir()) == names
        assert [c["id"] for c in content["categories"]] == [1, 2, 3]
    train, val = ((rendered / split / "000001.png").read_bytes() for split in ("train", "val"))
    assert train != val
    assert not list(rendered.parent.glob("*.partial"))


def test_annotations_fit_the_polygons(rendered: Path) -> None:
    """Box: the smallest around the polygon. Area: A = |sum x_i y_i+1 - x_i+1 y_i| / 2."""
    for record in json.loads((rendered / "train.json").read_text())["annotations"]:
        x, y = np.array(record["segmentation"][0]).reshape(-1, 2).T
        assert record["bbox"] == [x.min(), y.min(), np.ptp(x), np.ptp(y)]
        assert record["area"] == abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
        assert all(value * 4 == int(value * 4) for value in record["bbox"])
        assert record["iscrowd"] == 0


def test_second_call_changes_nothing(rendered: Path) -> None:
    before = (rendered / "train.json").stat().st_mtime_ns
    render_shapes(rendered, 3, 3)
    assert (rendered / "train.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_several_processes_at_once(rendered: Path, tmp_path: Path) -> None:
    """All of them return when the data set is complete; it is the one a single process writes."""
    folder = tmp_path / "root" / "shapes"
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=render_shapes, args=(folder, *COUNTS), daemon=True) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    for path in rendered.rglob("*.*"):
        assert (folder / path.relative_to(rendered)).read_bytes() == path.read_bytes()
    assert not list(folder.parent.glob("*.partial"))


def test_rest_of_a_killed_run_is_not_used(tmp_path: Path) -> None:
    partial = tmp_path / "shapes.partial"
    (partial / "train").mkdir(parents=True)
    (partial / "train" / "999999.png").write_bytes(b"half")
    render_shapes(tmp_path / "shapes", 2, 1)
    assert not partial.exists()
    assert len(list((tmp_path / "shapes").rglob("*.png"))) == 3


def test_interrupted_run_leaves_no_data_set(tmp_path: Path, monkeypatch) -> None:
    def fail(seed: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        render_shapes(tmp_path / "shapes", 2, 1)
    assert not (tmp_path / "shapes").exists()


def test_full_disk(tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(OSError, match=r"needs \d+\.\d MB .* where 1\.0 MB are free"):
        render_shapes(tmp_path / "shapes", 20, 1)
    assert not (tmp_path / "shapes").exists()


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    with pytest.raises(FileExistsError, match="Move it away"):
        render_shapes(tmp_path / "shapes", 1, 1)


def test_registered_and_rendered_on_first_use(tmp_path: Path, monkeypatch, caplog) -> None:
    """The package registers both names; loading renders, and gives contiguous classes 0..2."""
    assert {"shapes_train", "shapes_val"} <= set(DatasetCatalog)
    for name in ("shapes_train", "shapes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.setattr(shapes, "render_shapes", lambda folder: render_shapes(folder, 4, 2))
    shapes.register_shapes(str(tmp_path))
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.INFO):
        dicts = DatasetCatalog.get("shapes_train")
    assert "Rendering shapes_train" in caplog.text
    assert len(dicts) == 4
    labels = {a["category_id"] for d in dicts for a in d["annotations"]}
    assert labels <= {0, 1, 2}
    image = detection_utils.read_image(dicts[0]["file_name"], "RGB")
    assert image.shape == (dicts[0]["height"], dicts[0]["width"], 3)
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.evaluator_type == "coco"
    assert metadata.thing_classes == ["circle", "square", "triangle"]
    prepare_files("shapes_val")
    assert Path(metadata.json_file).is_file()
