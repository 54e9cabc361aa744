"""Whatever an image file is: the model gets its picture, or one line names the file."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from miti_detr.data import ImageError, read_image
from miti_detr.data.images import image_size

from .budget import budget

FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "bmp": "BMP", "webp": "WEBP", "gif": "GIF"}
GREY = {"I;16": np.uint16, "I": np.int32, "F": np.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


def attempt(path: Path, orientation: str = "apply") -> np.ndarray | None:
    """The picture, checked against its header; None if one line names the file."""
    try:
        image = read_image(path, "RGB", orientation)
    except ImageError as error:
        check_message(error, path)
        return None
    assert image.dtype == np.uint8
    assert image_size(path, orientation) == (image.shape[1], image.shape[0])
    return image


def check_message(error: ImageError, path: Path) -> None:
    assert str(path) in str(error)
    assert len(str(error).splitlines()) == 1


def picture(width: int, height: int) -> np.ndarray:
    """Left half dark, upper half red: each orientation looks different."""
    pixels = np.full((height, width, 3), 20, dtype=np.uint8)
    pixels[:, width // 2 :, 1] = 220
    pixels[: height // 2, :, 0] = 220
    return pixels


@budget
@given(
    kind=st.sampled_from(list(FORMATS)),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB"]),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tag=st.one_of(st.integers(0, 9), st.sampled_from([-1, 65535])),
)
def test_every_format_and_mode(
    folder: Path, kind: str, mode: str, size: tuple[int, int], tag: int
) -> None:
    path = folder / f"mode.{kind}"
    exif = Image.Exif()
    exif[0x0112] = tag
    try:
        base = Image.fromarray(picture(*size))
        base.convert(mode).save(path, FORMATS[kind], exif=exif, quality=95)
    except Exception:  # not a file that exists
        return
    upright, stored = attempt(path), attempt(path, "ignore")
    if stored is not None and kind in ("png", "tif", "jpg", "webp"):
        assert stored.shape[1::-1] == size
    if stored is not None and mode == "RGB" and kind in ("png", "tif"):
        turned = {5, 6, 7, 8}
        assert upright is not None
        np.testing.assert_array_equal(stored, picture(*size))
        assert upright.shape[1::-1] == (size[::-1] if tag in turned else size)


@pytest.mark.parametrize("kind", ["png", "tif", "jpg"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_applied_once(folder: Path, kind: str, tag: int) -> None:
    """The upright picture, stored in each of the eight ways, is read the same."""
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[tag]
    upright = Image.fromarray(picture(16, 24))
    stored = upright if inverse is None else upright.transpose(Image.Transpose(inverse))
    exif = Image.Exif()
    exif[0x0112] = tag
    path = folder / f"turned.{kind}"
    stored.save(path, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "jpg" else {}))
    found = read_image(path, "RGB").astype(int)
    assert np.abs(found - np.asarray(upright)).max() <= (40 if kind == "jpg" else 0)
    as_stored = read_image(path, "RGB", "ignore").astype(int)
    assert np.abs(as_stored - np.asarray(stored)).max() <= (40 if kind == "jpg" else 0)


@budget
@given(data=st.data())
def test_grey_of_more_than_8_bits(folder: Path, data: st.DataObject) -> None:
    """From the smallest to the largest value of the image; never all white or all black."""
    mode = data.draw(st.sampled_from(list(GREY)))
    low = data.draw(st.integers(0, 60000))
    high = data.draw(st.integers(low + 1, 65535))
    values = np.linspace(low, high, 12 * 10).reshape(12, 10).astype(GREY[mode])
    if mode == "F":
        values = values / data.draw(st.sampled_from([1, 1e-30, 65535, 1e30]))
        values[0, 1] = data.draw(st.sampled_from([values[0, 0], np.nan, np.inf, -np.inf]))
    path = folder / ("grey.png" if mode == "I;16" else "grey.tif")
    Image.fromarray(values.astype(GREY[mode])).save(path)
    image = attempt(path)
    assert image is not None
    assert (image.min(), image.max()) == (0, 255)
    assert (np.diff(image[1:, :, 0].ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("value", [0, 200, 40000])
def test_grey_of_one_value(folder: Path, value: int) -> None:
    path = folder / "flat.png"
    Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(path)
    image = attempt(path)
    assert image is not None
    assert image.max() == 0


@budget
@given(data=st.data())
def test_damaged_files(folder: Path, data: st.DataObject) -> None:
    """Cut off, bytes replaced, or other bytes at all."""
    kind = data.draw(st.sampled_from(list(FORMATS)))
    buffer = io.BytesIO()
    Image.fromarray(picture(23, 17)).save(buffer, FORMATS[kind])
    raw = bytearray(buffer.getvalue())
    first, last = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
    raw[first:last] = data.draw(st.binary(max_size=12))
    path = folder / f"damaged.{kind}"
    path.write_bytes(bytes(raw))
    try:
        read_image(path, "RGB")
    except ImageError as error:
        check_message(error, path)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "not a regular file"),
        (lambda path: os.symlink(path, path), "cannot be read"),
        (lambda path: None, "does not exist"),
        (lambda path: Path(path).write_bytes(b""), "its format is not known"),
        (lambda path: Image.new("L", (1, 5000)).save(path), "1 x 5000 pixels"),
        (lambda path: Image.new("L", (900, 4)).save(path), "900 x 4 pixels"),
    ],
)
def test_what_is_no_usable_image(tmp_path: Path, make: Any, reason: str) -> None:
    """Nothing of this hangs, fills the memory, or ends in a resize to no pixel."""
    path = tmp_path / "image.png"
    make(path)
    for read in (lambda: read_image(path, "RGB"), lambda: image_size(path)):
        with pytest.raises(ImageError, match=reason):
            read()
