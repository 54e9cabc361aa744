"""Reading image files: one reader for training, evaluation, prediction and checks."""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image

Item = TypeVar("Item")

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ORIENTATIONS = ("apply", "ignore")
MAX_CHECKED = 5000  # images of a data set whose headers are checked; a sample of a larger one
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


def read_image(file_name: str | os.PathLike[str], format: str, orientation: str = "apply") -> Any:
    """Read an image file.

    Grey images of more than 8 bits (16 or 32 bits, floats) are scaled so that their own smallest
    and largest values become 0 and 255; clipping would turn most of them white.

    Args:
        file_name: path, or an address that Detectron2's ``PathManager`` knows.
        format: ``RGB``, ``BGR``, ``L`` or another one of
            :func:`detectron2.data.detection_utils.convert_PIL_to_numpy`.
        orientation: ``apply`` the EXIF orientation, so that the image is upright, or ``ignore`` it.

    Returns:
        (H, W, C) uint8, contiguous.

    Raises:
        ImageError: the file is missing, not a regular file, not an image, truncated, or more than
            100 times as long as it is wide.
    """
    with _opened(file_name) as image:
        is_tiff = image.format == "TIFF"
        tag = _orientation(image) if is_tiff else 1  # loading a TIFF file turns it upright
        image.load()
        if is_tiff and orientation == "ignore":
            image = _transposed(image, _AS_STORED.get(tag))
        elif not is_tiff and orientation == "apply":
            image = _transposed(image, _UPRIGHT.get(_orientation(image)))
        _check_aspect(image.size)
        if image.mode.startswith(("I", "F")):
            image = _to_8_bits(image)
        return np.ascontiguousarray(convert_PIL_to_numpy(image, format))


def image_size(file_name: str | os.PathLike[str], orientation: str = "apply") -> tuple[int, int]:
    """Width and height in pixels from the header of an image file, as :func:`read_image` reads it.

    Args:
        file_name: path or address.
        orientation: see :func:`read_image`.

    Raises:
        ImageError: the header shows that the image cannot be read.
    """
    with _opened(file_name) as image:
        width, height = image.size
        _check_aspect(image.size)
        if image.format == "TIFF":  # Pillow gives the upright size
            turned = orientation == "ignore" and _orientation(image) > 4
        else:
            # A PNG without EXIF data would decode its pixels to look for them.
            turned = orientation == "apply" and "exif" in image.info and _orientation(image) > 4
        return (height, width) if turned else (width, height)


def check_size(record: dict[str, Any], size: tuple[int, int], orientation: str) -> None:
    """Compare the size of an image with the one that its data set gives.

    Args:
        record: with ``file_name``, and perhaps with ``width`` and ``height`` in pixels.
        size: width and height of the image.
        orientation: how it was read; for the message.

    Raises:
        ImageError: the sizes differ; the message says which setting would fit.
    """
    given = record.get("width", size[0]), record.get("height", size[1])
    if given == size:
        return
    file = record["file_name"]
    advice = "Correct the annotation file or the image"
    other = ORIENTATIONS[orientation == "apply"]
    if given == size[::-1] and image_size(file, other) == given:
        advice = f"It fits with the override DATASETS.EXIF_ORIENTATION {other}"
    raise ImageError(
        f"The image {file} is {size[0]} x {size[1]} pixels, but its data set says "
        f"{given[0]} x {given[1]}. {advice}"
    )


def find_faults(images: Sequence[Item], fault: Callable[[Item], str]) -> tuple[list[str], int]:
    """Check the headers of at most 5,000 images, evenly spread over a data set.

    Args:
        images: of a data set.
        fault: returns what is wrong with an image, or "".

    Returns:
        The faults found, and the number of images that were checked.
    """
    sample = images[:: -(-len(images) // MAX_CHECKED) or 1]
    with ThreadPoolExecutor(8) as pool:  # mostly waits for the disk
        return [found for found in pool.map(fault, sample) if found], len(sample)


@contextmanager
def _opened(file_name: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong inside is an :class:`ImageError`."""
    path = os.fspath(file_name)
    try:
        # A named pipe or a device would block, or never end.
        if "://" not in path and not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("it is not a regular file")
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"The image {path} does not exist") from error
    except Exception as error:  # which ones depends on the decoder
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("cannot identify image file"):
            reason = "its format is not known"
        raise ImageError(f"The image {path} cannot be read: {reason}") from error


def _orientation(image: Image.Image) -> int:
    try:
        tag = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # malformed EXIF data; the pixels can still be read
        return 1
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _transposed(image: Image.Image, method: Image.Transpose | None) -> Image.Image:
    return image if method is None else image.transpose(method)


def _check_aspect(size: tuple[int, int]) -> None:
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
