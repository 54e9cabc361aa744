"""Training images are resized by torch, and large JPEG files decoded at a reduced size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from miti_detr.data import DetrDatasetMapper, ImageError
from miti_detr.data.resize import FastResizeShortestEdge
from tests.data.helpers import make_cfg

BOX = [410.0, 180.0, 120.0, 64.0]  # xywh in the pixels of the file


def _scene(path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """A smooth picture with a bright rectangle, and its record."""
    width, height = size
    pixels = np.full((height, width, 3), 40, np.uint8)
    x, y, w, h = map(int, BOX)
    pixels[y : y + h, x : x + w] = (250, 200, 240)
    Image.fromarray(pixels).save(path, quality=95)
    annotation = {"bbox": BOX, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {"file_name": str(path), "width": width, "height": height, "image_id": 1}
    return {**record, "annotations": [annotation]}


def _config(*, crop: bool, side: int) -> CfgNode:
    return make_cfg(
        *("INPUT.MIN_SIZE_TRAIN", (side,), "INPUT.MAX_SIZE_TRAIN", 4 * side),
        *("INPUT.RANDOM_FLIP", "none", "INPUT.CROP.ENABLED", crop),
        *("INPUT.CROP.MIN_SIZE_BEFORE", (side,), "INPUT.CROP.TYPE", "relative"),
        *("INPUT.CROP.SIZE", [1.0, 1.0]),
    )


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("side", [150, 300, 700])
@pytest.mark.parametrize("size", [(801, 602), (803, 601), (640, 480)])
def test_boxes_stay_on_their_objects(
    tmp_path: Path, size: tuple[int, int], side: int, crop: bool
) -> None:
    """Decoded at a quarter, half or all of their size, which is not always a whole number."""
    record = _scene(tmp_path / "a.jpg", size)
    mapped = DetrDatasetMapper(_config(crop=crop, side=side), is_train=True)(record)
    assert (mapped["width"], mapped["height"]) == (record["width"], record["height"])
    image = mapped["image"].float()
    (box,) = mapped["instances"].gt_boxes.tensor
    scale = image.shape[2] / record["width"]
    x, y, w, h = BOX
    expected = torch.tensor([x, y, x + w, y + h]) * scale
    torch.testing.assert_close(box, expected, rtol=0, atol=0.6)
    bright = (image.mean(0) > 135).nonzero()
    found = torch.cat([bright.min(0).values.flip(0), bright.max(0).values.flip(0) + 1])
    torch.testing.assert_close(found.float(), box, rtol=0, atol=1.5)


def test_what_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a reduced size in training only, never smaller than the largest resize."""
    record = _scene(tmp_path / "a.jpg", (1600, 1200))
    seen = []
    monkeypatch.setattr(
        FastResizeShortestEdge,
        "get_transform",
        lambda self, image: seen.append(image.shape) or T.NoOpTransform(),  # type: ignore[func-returns-value]
    )
    for side in (140, 160, 300, 900):
        DetrDatasetMapper(_config(crop=False, side=side), is_train=True)(record)
    assert seen == [(150, 200, 3), (300, 400, 3), (300, 400, 3), (1200, 1600, 3)]
    in_inference = DetrDatasetMapper(_config(crop=False, side=140), is_train=False)
    assert in_inference.least_side is None


def test_the_size_of_the_file_is_checked(tmp_path: Path) -> None:
    record = _scene(tmp_path / "a.jpg", (1600, 1200)) | {"width": 800, "height": 600}
    with pytest.raises(ImageError, match="is 1600 x 1200 pixels, but its data set says 800 x 600"):
        DetrDatasetMapper(_config(crop=False, side=200), is_train=True)(record)


@pytest.mark.parametrize("sizes", [((48, 64), 80), ((90, 120), 67), ((50, 100), 40)])
def test_resize_is_that_of_detectron2(sizes: tuple[tuple[int, int], int]) -> None:
    """Up to rounding; mirrored images and images of one channel as well."""
    (height, width), side = sizes
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for pixels in (image, image[:, ::-1], image[..., :1]):
        fast = FastResizeShortestEdge(side, 1000).get_transform(pixels).apply_image(pixels)
        slow = T.ResizeShortestEdge(side, 1000).get_transform(pixels).apply_image(pixels)
        difference = np.abs(fast.astype(int) - slow)
        assert fast.shape == slow.shape
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.1
