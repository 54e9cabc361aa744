"""Masks of objects: every form of truth, through every augmentation."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from miti_detr.data import DetrDatasetMapper, ImageError
from miti_detr.data.object_masks import object_masks, segment_ids
from miti_detr.evaluation.panoptic import encode_ids

from .helpers import make_cfg

HEIGHT, WIDTH = 60, 80
SQUARE = [20.0, 10, 50, 10, 50, 40, 20, 40]  # x 20..50, y 10..40
MASK_ON = ("MODEL.MASK_ON", True, "INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MAX_SIZE_TRAIN", 100)


def runs(polygons: list[list[float]]) -> dict[str, Any]:
    merged = mask_util.merge(mask_util.frPyObjects(polygons, HEIGHT, WIDTH))
    return {"size": merged["size"], "counts": merged["counts"].decode()}


def uncompressed(polygons: list[list[float]]) -> dict[str, Any]:
    pixels = mask_util.decode(runs(polygons)).ravel(order="F")
    changes = np.flatnonzero(np.diff(pixels, prepend=0)).tolist()
    counts = np.diff([0, *changes, len(pixels)]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def record(folder: Path, *shapes: Any, **changes: Any) -> dict[str, Any]:
    path = folder / "image.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    annotations = [
        {"bbox": [20, 10, 30, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        | {"segmentation": shape}
        for shape in shapes
    ]
    made = {"file_name": str(path), "height": HEIGHT, "width": WIDTH, "annotations": annotations}
    return {**made, **changes}


@pytest.mark.parametrize("flip", [False, True])
def test_all_forms_are_the_same_mask(tmp_path: Path, flip: bool) -> None:
    """A square of 30 pixels in an image reduced by 4 / 5: 24 pixels, in its place."""
    forms = [[SQUARE], runs([SQUARE]), uncompressed([SQUARE])]
    flips = [T.HFlipTransform(WIDTH)] if flip else []
    transforms = T.TransformList([*flips, T.ResizeTransform(HEIGHT, WIDTH, 48, 64)])
    item = record(tmp_path, *forms)
    masks = object_masks(item, item["annotations"], transforms, (48, 64)).tensor
    expected = torch.zeros(48, 64, dtype=torch.bool)
    expected[8:32, slice(24, 48) if flip else slice(16, 40)] = True
    for mask in masks:
        assert torch.equal(mask, expected)


def test_a_crop_cuts_polygons() -> None:
    """As if the polygon was filled first; points may lie outside of the crop on every side."""
    star = [40.0, 2, 50, 25, 78, 30, 50, 36, 40, 58, 31, 36, 3, 30, 30, 24]
    item = {"file_name": "image.png"}
    crop = T.TransformList([T.CropTransform(20, 15, 41, 30)])
    (mask,) = object_masks(item, [{"segmentation": [star]}], crop, (30, 41)).tensor
    (decoded,) = object_masks(item, [{"segmentation": runs([star])}], crop, (30, 41)).tensor
    assert 0.3 < decoded.float().mean() < 0.9
    assert (mask != decoded).float().mean() < 0.02  # edges of polygons are rounded


def test_several_polygons_are_one_mask(tmp_path: Path) -> None:
    other = [60.0, 40, 70, 40, 70, 50, 60, 50]
    item = record(tmp_path, [SQUARE, other])
    masks = object_masks(item, item["annotations"], T.TransformList([]), (HEIGHT, WIDTH))
    assert masks.tensor.sum() == 30 * 30 + 10 * 10


def test_mapper_equals_detectron2(tmp_path: Path) -> None:
    """Polygons and bit masks of Detectron2's own functions, for a flipped and resized image."""
    item = record(tmp_path, [SQUARE], runs([SQUARE]))
    mapper = DetrDatasetMapper(make_cfg(*MASK_ON), is_train=True)
    np.random.seed(1)
    instances = mapper(item)["instances"]
    augmented = T.AugInput(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    np.random.seed(1)
    transforms = mapper.augmentations(augmented)
    size = augmented.image.shape[:2]
    theirs = [
        utils.transform_instance_annotations({**a}, transforms, size) for a in item["annotations"]
    ]
    expected = utils.annotations_to_instances(theirs, size, mask_format="bitmask")
    assert isinstance(instances.gt_masks, BitMasks)
    assert torch.equal(instances.gt_masks.tensor, expected.gt_masks.tensor)
    torch.testing.assert_close(instances.gt_boxes.tensor, expected.gt_boxes.tensor)


def test_masks_go_with_their_boxes(tmp_path: Path) -> None:
    """Crowds and boxes outside a crop are left out, and their masks with them."""
    item = record(tmp_path, [SQUARE], runs([SQUARE]), [SQUARE])
    item["annotations"][0]["iscrowd"] = 1
    item["annotations"][1]["bbox"] = [500, 500, 20, 20]
    instances = DetrDatasetMapper(make_cfg(*MASK_ON), is_train=True)(item)["instances"]
    assert len(instances) == len(instances.gt_masks) == 1
    nothing = DetrDatasetMapper(make_cfg(*MASK_ON), is_train=True)(record(tmp_path))
    assert nothing["instances"].gt_masks.tensor.shape == (0, 48, 64)


def test_boxes_need_no_masks(tmp_path: Path) -> None:
    item = record(tmp_path, None)
    instances = DetrDatasetMapper(make_cfg(*MASK_ON[2:]), is_train=True)(item)["instances"]
    assert not instances.has("gt_masks")
    for shape in (None, []):
        item["annotations"][0]["segmentation"] = shape
        with pytest.raises(ValueError, match=r"object of .*image\.png has no 'segmentation'"):
            DetrDatasetMapper(make_cfg(*MASK_ON), is_train=True)(item)


def panoptic_record(folder: Path, ids: np.ndarray) -> dict[str, Any]:
    (folder / "segments.png").write_bytes(encode_ids(ids))
    info = [
        {"id": i, "category_id": k, "bbox": [0, 0, 40, 60], "iscrowd": int(k == 2)}
        for k, i in enumerate((5, 300, 70_000))
    ]
    files = {"pan_seg_file_name": str(folder / "segments.png"), "segments_info": info}
    item = record(folder, **files)
    del item["annotations"]
    return item


def test_segments_are_objects(tmp_path: Path) -> None:
    """Ids above 255 and 65535; the third segment is a crowd."""
    ids = np.repeat([5, 300, 70_000, 0], 20)[None].repeat(HEIGHT, axis=0)
    item = panoptic_record(tmp_path, ids)
    cfg = make_cfg(*MASK_ON, "INPUT.RANDOM_FLIP", "none")
    instances = DetrDatasetMapper(cfg, is_train=True)(item)["instances"]
    assert instances.gt_classes.tolist() == [0, 1]
    columns = instances.gt_masks.tensor.all(1)
    assert torch.equal(columns, instances.gt_masks.tensor.any(1))
    assert [row.nonzero()[:, 0].tolist() for row in columns] == [
        list(range(16)),
        list(range(16, 32)),
    ]
    assert instances.gt_boxes.tensor[0].tolist() == [0, 0, 32, 48]


def test_segments_that_do_not_fit(tmp_path: Path) -> None:
    mapper = DetrDatasetMapper(make_cfg(*MASK_ON), is_train=True)
    item = panoptic_record(tmp_path, np.ones((HEIGHT, WIDTH + 1)))
    with pytest.raises(ImageError, match=r"segments\.png have 81 x 60 pixels, .* has 80 x 60"):
        mapper(item)
    (tmp_path / "segments.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"segments\.png cannot be read"):
        mapper(item)


def test_colours_and_ids_are_inverse() -> None:
    ids = np.random.default_rng(0).integers(0, 256**3, (5, 7))
    assert (segment_ids(np.array(Image.open(io.BytesIO(encode_ids(ids))))) == ids).all()
