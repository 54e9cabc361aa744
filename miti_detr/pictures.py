"""Decoding of image files by Pillow: no torch and no Detectron2."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_ASPECT_RATIO = 100  # thinner images would be resized to less than a pixel, or to gigabytes

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_AS_STORED = {
    **_UPRIGHT,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


class ImageError(OSError):
    """An image file cannot be used. The message is one line that names the file."""

    def __init__(self, message: str) -> None:
        """Keep the message only.

        Args:
            message: also that of a worker process of torch's ``DataLoader``, which puts the
                traceback into it; its last line is the original message.
        """
        lines = message.strip().splitlines() or [""]
        super().__init__(lines[-1].partition("ImageError: ")[2] or lines[-1])


@contextmanager
def opened(
    file_name: str | os.PathLike[str], open_file: Callable[..., Any] = open
) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong inside is an :class:`ImageError`.

    Args:
        file_name: path, or what ``open_file`` knows.
        open_file: takes it and the mode ``rb``.
    """
    path = os.fspath(file_name)
    try:
        # A named pipe or a device would block, or never end.
        if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")
        with open_file(path, "rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"The image {path} does not exist") from error
    except Exception as error:  # which ones depends on the decoder
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("cannot identify image file"):
            reason = "its format is not known"
        raise ImageError(f"The image {path} cannot be read: {reason}") from error


def upright(image: Image.Image, orientation: str = "apply") -> Image.Image:
    """Load an image, turn it upright, and bring it to 8 bits.

    Grey images of more than 8 bits (16 or 32 bits, floats) are scaled so that their own smallest
    and largest values become 0 and 255; clipping would turn most of them white.

    Args:
        image: opened by Pillow.
        orientation: ``apply`` the EXIF orientation, or ``ignore`` it.

    Raises:
        ValueError: the image is more than 100 times as long as it is wide.
    """
    is_tiff = image.format == "TIFF"
    tag = exif_orientation(image) if is_tiff else 1  # loading a TIFF file turns it upright
    image.load()
    if is_tiff and orientation == "ignore":
        image = _transposed(image, _AS_STORED.get(tag))
    elif not is_tiff and orientation == "apply":
        image = _transposed(image, _UPRIGHT.get(exif_orientation(image)))
    check_aspect(image.size)
    return _to_8_bits(image) if image.mode.startswith(("I", "F")) else image


def decode(image: Image.Image, channels: str, orientation: str = "apply") -> Any:
    """Decode the pixels of an image as (H, W, 3) uint8, ``RGB`` or ``BGR``; see :func:`upright`."""
    array = np.asarray(upright(image, orientation).convert("RGB"))
    return np.ascontiguousarray(array[:, :, ::-1] if channels == "BGR" else array)


def read_picture(
    file_name: str | os.PathLike[str], channels: str, orientation: str = "apply"
) -> Any:
    """Read an image file; see :func:`decode`.

    Raises:
        ImageError: the file is missing, not a regular file, not an image, truncated, or more than
            100 times as long as it is wide.
    """
    with opened(file_name) as image:
        return decode(image, channels, orientation)


def exif_orientation(image: Image.Image) -> int:
    """How the image is turned, 1 to 8; 1 is upright."""
    try:
        tag = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # malformed EXIF data; the pixels can still be read
        return 1
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _transposed(image: Image.Image, method: Image.Transpose | None) -> Image.Image:
    return image if method is None else image.transpose(method)


def check_aspect(size: tuple[int, int]) -> None:
    """Refuse an image that is far too thin; width and height in pixels."""
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(
            f"it is {size[0]} x {size[1]} pixels; the longer side may be at most "
            f"{MAX_ASPECT_RATIO} times the shorter one"
        )


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A grey image of integers or floats, stretched from its own range to 0..255."""
    values = np.asarray(image).astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("it has no finite value")
    low, high = values[finite].min(), values[finite].max()
    values = np.where(finite, values, low)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (values - low) / (high - low) * 255 if high > low else np.zeros_like(values)
    return Image.fromarray(np.nan_to_num(scaled).round().astype(np.uint8))
