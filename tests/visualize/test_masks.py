"""Masks and panoptic segmentations in pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from miti_detr.data.panoptic import register_panoptic
from miti_detr.visualize.classes import ClassTable, class_table
from miti_detr.visualize.detections import CAPTION, CELL, GAP, draw_detections
from miti_detr.visualize.drawing import class_colour, draw_masks, draw_segments
from tests.evaluation.test_panoptic import write_truth
from tests.visualize.conftest import FixedMasks, FixedPanoptic, predictor_of
from tests.visualize.test_detections import register_images

CLASSES = ClassTable(["cat", "dog", "sky"], [17, 18, 19])
GREY = (128, 128, 128)


def grey(width: int = 400, height: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def test_a_mask_is_tinted_and_outlined() -> None:
    mask = np.zeros((20, 40), dtype=bool)
    mask[5:15, 10:30] = True
    pixels = np.asarray(draw_masks(grey(), [mask], [1])).astype(int)
    colour = np.array(class_colour(1))
    assert (pixels[20, 20] == GREY).all()  # 10 times enlarged: outside
    assert (pixels[100, 200] == np.round(0.55 * 128 + 0.45 * colour)).all()
    edges = (pixels == colour).all(-1)
    assert edges[50, 100:300].all()
    assert edges[50:150, 299].all()
    assert edges.sum() == 2 * 200 + 2 * 100 - 4


def test_masks_of_an_empty_list_change_nothing() -> None:
    assert draw_masks(grey(), [], []).getcolors() == [(400 * 200, GREY)]


def test_every_segment_has_its_name(tmp_path: Path) -> None:
    """The label is on the segment, also where that is a ring without its own centre."""
    ids = np.ones((40, 80), dtype=np.int32)
    ids[10:30, 20:60] = 2
    segments = [{"id": 1, "category_id": 2}, {"id": 2, "category_id": 0}]
    pixels = np.asarray(draw_segments(grey(), ids, segments, CLASSES.names))
    for index in (0, 2):  # the background of the text
        assert (pixels == class_colour(index)).all(-1).sum() > 300
    ids[ids == 2] = 1  # a segment without a pixel
    draw_segments(grey(), ids, segments, CLASSES.names)


def test_truth_has_masks_beside_detections_with_masks(tmp_path: Path) -> None:
    """The truth is a triangle in a box; without masks in the model only the box is drawn."""
    name = register_images(tmp_path, 1)
    content = json.loads((tmp_path / "val.json").read_text())
    for record in content["annotations"]:
        record["segmentation"] = [[50, 10, 95, 10, 50, 45]]
    (tmp_path / "val.json").write_text(json.dumps(content))
    from detectron2.data import MetadataCatalog

    MetadataCatalog.get(name).source._with_masks = True
    draw_detections(predictor_of(FixedMasks()), name, tmp_path / "out.png", num_classes=3)
    left = np.asarray(Image.open(tmp_path / "out.png")).astype(int)[3 * CAPTION :, GAP:]
    scale = CELL / 100
    tinted = np.round(0.55 * 128 + 0.45 * np.array(class_colour(0)))
    assert (left[int(15 * scale), int(58 * scale)] == tinted).all()
    assert (left[int(40 * scale), int(90 * scale)] == GREY).all()


def test_panoptic_truth(tmp_path: Path) -> None:
    """Ids of COCO's panoptic format: things and stuff have their own colours and names."""
    ids = np.repeat([7, 300], 32)[None].repeat(32, axis=0)
    write_truth(tmp_path, [(ids, [{"id": 7, "category_id": 11}, {"id": 300, "category_id": 99}])])
    grey(64, 32).save(tmp_path / "1.jpg")
    paths = [str(tmp_path / part) for part in ("truth.json", "", "segments")]
    register_panoptic("panoptic_pictures", *paths)
    assert class_table("panoptic_pictures", 3) == ClassTable(["cat", "dog", "sky"], [11, 12, 99])
    draw_detections(
        predictor_of(FixedPanoptic()), "panoptic_pictures", tmp_path / "out.png", num_classes=3
    )
    pixels = np.asarray(Image.open(tmp_path / "out.png")).astype(int)[3 * CAPTION :]
    for left, classes in ((GAP, (0, 2)), (2 * GAP + CELL, (1, 2))):
        for x, index in zip((40, 280), classes, strict=True):
            tinted = np.round(0.55 * 128 + 0.45 * np.array(class_colour(index)))
            assert np.abs(pixels[20, left + x] - tinted).max() <= 1
