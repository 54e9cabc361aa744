from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from miti_detr.data import read_image
from miti_detr.pictures import ImageError
from miti_detr.predict.inputs import Source, to_array

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_all_kinds_of_an_image_are_the_same_array(tmp_path: Path, channels: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    wanted = RGB if channels == "RGB" else RGB[:, :, ::-1]
    kinds: list[tuple[Any, str | None]] = [
        (path, None),
        (str(path), None),
        (Image.fromarray(RGB), None),
        (RGB, "RGB"),
        (RGB[:, :, ::-1], "BGR"),
        (RGB.astype(np.float32), "RGB"),
        (RGB.astype(np.int64), "RGB"),
        (torch.from_numpy(RGB.transpose(2, 0, 1).copy()), "RGB"),
        (torch.from_numpy(RGB.transpose(2, 0, 1)[::-1].copy()).float(), "BGR"),
    ]
    for image, given in kinds:
        array = to_array(image, channels, given=given)
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, wanted, err_msg=str(type(image)))


def test_grey_images_need_no_channels() -> None:
    for grey in (RGB[:, :, 0], RGB[:, :, :1], torch.from_numpy(RGB[None, :, :, 0].copy())):
        np.testing.assert_array_equal(to_array(grey, "BGR"), np.repeat(RGB[:, :, :1], 3, axis=2))


def test_files_are_read_as_in_training(tmp_path: Path) -> None:
    """Upright, and grey images of 16 bits scaled."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.jpg"
    Image.fromarray(RGB).save(turned, exif=exif)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000).save(deep)
    for path in (turned, deep):
        for image in (path, Image.open(path)):
            np.testing.assert_array_equal(to_array(image, "BGR"), read_image(path, "BGR"))
    assert to_array(turned, "RGB").shape == (7, 5, 3)


@pytest.mark.parametrize(
    ("image", "given", "error", "message"),
    [
        (RGB, None, ValueError, "channels='BGR' for images that OpenCV has read"),
        (RGB, "GBR", ValueError, "channels is 'GBR'"),
        (RGB / 255, "RGB", ValueError, r"are in 0\.\.0\.97.*Scale them to 0\.\.255"),
        (RGB.astype(np.int64) - 300, "RGB", ValueError, "Scale them to"),
        (RGB * np.float32(np.nan), "RGB", ValueError, "Scale them to"),
        (RGB > 3, "RGB", ValueError, "an image holds bool"),
        (RGB[None], "RGB", ValueError, r"shape \(1, 5, 7, 3\).*several images as a list"),
        (torch.zeros(5, 7, 3), "RGB", ValueError, r"shape \(5, 7, 3\).*tensors as \(3, H, W\)"),
        (RGB[:0], "RGB", ValueError, "shape"),
        ({"image": RGB}, None, TypeError, "an image is a dict"),
        ("gone.jpg", None, ImageError, r"gone\.jpg does not exist"),
        (np.zeros((1, 500, 3), np.uint8), "RGB", ValueError, "100 times"),
    ],
)
def test_what_is_no_image_is_refused(
    image: Any, given: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Source(image, given).read("RGB")
