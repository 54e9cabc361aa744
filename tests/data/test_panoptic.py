"""Panoptic data sets: the built-in one, those of a config, and Detectron2's."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from PIL import Image

from miti_detr.data import build_train_loader, check_datasets, register_panoptic_format
from miti_detr.data.object_masks import ids_to_colours, segment_ids
from miti_detr.data.panoptic import register_shapes_panoptic, render_shapes_panoptic
from miti_detr.data.shapes import render_shapes
from miti_detr.data.shapes_render import rasterise, render

from .helpers import make_cfg


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shapes`` with a few images, and ``shapes_panoptic``."""
    root = tmp_path_factory.mktemp("root")
    render_shapes(root / "shapes", 12, 5)
    render_shapes_panoptic(root / "shapes_panoptic", root / "shapes")
    return root


@pytest.fixture
def registered(root: Path) -> Path:
    for name in ("shapes_panoptic_train", "shapes_panoptic_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_shapes_panoptic(str(root))
    return root


def test_shapes_cover_each_other_as_in_the_picture(root: Path) -> None:
    """Ids of shapes from bottom to top; the background is the last segment, of its texture."""
    content = json.loads((root / "shapes_panoptic/train.json").read_text())
    textures = set()
    for number, annotation in enumerate(content["annotations"]):
        _, shapes = render(number)
        path = root / "shapes_panoptic/train" / annotation["file_name"]
        ids = segment_ids(np.array(Image.open(path)))
        expected = np.full_like(ids, len(shapes) + 1)
        for k, shape in enumerate(shapes, start=1):
            window, mask = rasterise(shape)
            expected[window][mask] = k
        assert (ids == expected).all()
        segments = annotation["segments_info"]
        assert [s["category_id"] - 1 for s in segments[:-1]] == [s.label for s in shapes]
        textures.add(segments[-1]["category_id"])
        for segment in segments:
            rows, columns = np.nonzero(ids == segment["id"])
            x, y, width, height = segment["bbox"]
            assert segment["area"] == len(rows)
            assert (columns.min(), columns.max() + 1) == (x, x + width)
            assert (rows.min(), rows.max() + 1) == (y, y + height)
    assert textures == {4, 5, 6}
    assert [c["isthing"] for c in content["categories"]] == [1, 1, 1, 0, 0, 0]


def test_dicts_equal_those_of_detectron2(registered: Path) -> None:
    """Apart from sizes, which Detectron2's do not have, and its images being .jpg."""
    metadata = MetadataCatalog.get("shapes_panoptic_val")
    assert metadata.thing_classes == metadata.stuff_classes
    assert metadata.stuff_dataset_id_to_contiguous_id == {4: 3, 5: 4, 6: 5}
    found = DatasetCatalog.get("shapes_panoptic_val")
    images = registered / "jpg"
    images.mkdir(exist_ok=True)
    for record in found:
        Image.new("RGB", (1, 1)).save(images / Path(record["file_name"]).with_suffix(".jpg").name)
    expected = load_coco_panoptic_json(
        metadata.panoptic_json,
        str(images),
        metadata.panoptic_root,
        {k: getattr(metadata, k) for k in dir_of(metadata)},
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["segments_info"] == theirs["segments_info"]
        assert ours["pan_seg_file_name"] == theirs["pan_seg_file_name"]
        assert ours["image_id"] == theirs["image_id"]


def dir_of(metadata: Any) -> list[str]:
    return ["thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"]


PANOPTIC = (
    *("MODEL.MASK_ON", True, "MODEL.DETR.NUM_CLASSES", 6, "MODEL.DETR.STUFF_CLASSES", [3, 4, 5]),
    *("DATASETS.TRAIN", ("shapes_panoptic_train",), "SOLVER.IMS_PER_BATCH", 4),
    *("DATASETS.TEST", ("shapes_panoptic_val",)),
)


def test_batches_have_masks_of_things_and_stuff(registered: Path) -> None:
    cfg = make_cfg(*PANOPTIC, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    check_datasets(cfg)
    batch = next(iter(build_train_loader(cfg)))
    for item in batch:
        instances = item["instances"]
        assert (instances.gt_masks.tensor.sum(0) == 1).all()  # each pixel in one segment
        assert (instances.gt_classes >= 3).sum() == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.DETR.NUM_CLASSES", 3), r"has 6 classes .* Add the override .*NUM_CLASSES 6"),
        (("MODEL.DETR.STUFF_CLASSES", [5]), r'\[5\]\. Add .*STUFF_CLASSES "\[3, 4, 5\]"'),
    ],
)
def test_classes_must_be_those_of_the_model(
    registered: Path, overrides: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_datasets(make_cfg(*PANOPTIC, *overrides))


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """One image of two segments."""
    (tmp_path / "segments").mkdir()
    ids = np.repeat([7, 8], 5)[None].repeat(10, axis=0)
    Image.fromarray(ids_to_colours(ids)).save(tmp_path / "segments/1.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "1.png")
    segments = [
        {"id": i, "category_id": c, "area": 50, "bbox": [x, 0, 5, 10], "iscrowd": 0}
        for i, c, x in ((7, 3, 0), (8, 5, 5))
    ]
    return {
        "images": [{"id": 4, "file_name": "1.png", "width": 10, "height": 10}],
        "annotations": [{"image_id": 4, "file_name": "1.png", "segments_info": segments}],
        "categories": [
            {"id": 5, "name": "sky", "isthing": 0},
            {"id": 3, "name": "cat", "isthing": 1},
        ],
    }


def own_cfg(folder: Path, content: dict[str, Any]) -> Any:
    (folder / "truth.json").write_text(json.dumps(content))
    entry = ["pets", *(str(folder / name) for name in ("truth.json", "", "segments"))]
    return make_cfg(
        *("DATASETS.COCO_FORMAT", [entry], "DATASETS.TRAIN", ("pets",)),
        *("MODEL.MASK_ON", True, "MODEL.DETR.STUFF_CLASSES", [1]),
    )


def test_own_data(tmp_path: Path, content: dict[str, Any]) -> None:
    cfg = own_cfg(tmp_path, content)
    for _ in range(2):
        register_panoptic_format(cfg)
    check_datasets(cfg)
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["cat", "sky"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0}
    assert metadata.stuff_dataset_id_to_contiguous_id == {5: 1}


def _change(content: dict[str, Any], *path: Any, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(content)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed


SEGMENT = ("annotations", 0, "segments_info", 1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("categories", 0, "isthing"), None, r"'sky' has the 'isthing' None. It must be 1"),
        (("categories", 0, "id"), "5", r"'id' of all 'categories' must be different integers"),
        (("annotations", 0, "image_id"), 5, r"entry 0 .* has no image: 'image_id' 5"),
        (("annotations", 0, "file_name"), None, r"has no 'file_name', the PNG file"),
        (("annotations", 0, "segments_info"), None, r"has no list 'segments_info'"),
        ((*SEGMENT, "category_id"), 6, r"segment 8: unknown 'category_id' 6"),
        ((*SEGMENT, "id"), 0, r"segment 0: 'id' must be an integer from 1"),
        ((*SEGMENT, "area"), None, r"segment 8: 'area' must be its number of pixels"),
        ((*SEGMENT, "bbox"), [1, 2], r"segment 8: 'bbox' must be"),
        ((*SEGMENT, "iscrowd"), 2, r"segment 8: 'iscrowd' must be 0 or 1"),
    ],
)
def test_faults_are_named(
    tmp_path: Path, content: dict[str, Any], path: tuple[Any, ...], value: Any, message: str
) -> None:
    cfg = own_cfg(tmp_path, _change(content, *path, value=value))
    register_panoptic_format(cfg)
    with pytest.raises(ValueError, match=message):
        check_datasets(cfg)


def test_missing_files_are_named(tmp_path: Path, content: dict[str, Any]) -> None:
    cfg = own_cfg(tmp_path, content)
    register_panoptic_format(cfg)
    (tmp_path / "segments/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"pets names images that do not exist: .*1\.png"):
        check_datasets(cfg)


def test_sets_of_detectron2(tmp_path: Path, content: dict[str, Any]) -> None:
    """Its standard form is trained on; the one that numbers things and stuff apart is not."""
    (tmp_path / "truth.json").write_text(json.dumps(content))
    Image.new("RGB", (10, 10)).save(tmp_path / "1.jpg")
    paths = {"image_root": tmp_path, "panoptic_root": tmp_path / "segments"}
    files = {k: str(v) for k, v in {**paths, "panoptic_json": tmp_path / "truth.json"}.items()}
    names = {"thing_classes": ["cat", "sky"], "stuff_classes": ["cat", "sky"]}
    things = {"thing_dataset_id_to_contiguous_id": {3: 0}}
    for name, index in (("standard", 1), ("apart", 0)):
        stuff = {"stuff_dataset_id_to_contiguous_id": {5: index}}
        register_coco_panoptic(name, {**names, **things, **stuff}, **files)
    overrides = ("MODEL.MASK_ON", True, "MODEL.DETR.STUFF_CLASSES", [1], "DATASETS.TRAIN")
    check_datasets(make_cfg(*overrides, ("standard",)))
    with pytest.raises(ValueError, match="numbers things and stuff apart"):
        check_datasets(make_cfg(*overrides, ("apart",)))
