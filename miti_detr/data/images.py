"""Reading image files: one reader for training, evaluation, prediction and checks."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager

from miti_detr.pictures import (
    IMAGE_SUFFIXES,
    ImageError,
    check_aspect,
    exif_orientation,
    opened,
    upright,
)

__all__ = ["IMAGE_SUFFIXES", "ORIENTATIONS", "ImageError", "image_size", "read_image"]

Item = TypeVar("Item")

ORIENTATIONS = ("apply", "ignore")
MAX_CHECKED = 5000  # images of a data set whose headers are checked; a sample of a larger one


def read_image(
    file_name: str | os.PathLike[str],
    format: str,
    orientation: str = "apply",
    *,
    least_side: int | None = None,
) -> Any:
    """Read an image file.

    Grey images of more than 8 bits are scaled, see :func:`~miti_detr.pictures.upright`.

    Args:
        file_name: path, or an address that Detectron2's ``PathManager`` knows.
        format: ``RGB``, ``BGR``, ``L`` or another one of
            :func:`detectron2.data.detection_utils.convert_PIL_to_numpy`.
        orientation: ``apply`` the EXIF orientation, so that the image is upright, or ``ignore`` it.
        least_side: in pixels; a JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size, which is
            faster, as long as no side becomes shorter than this. None: at its size.

    Returns:
        (H, W, C) uint8, contiguous.

    Raises:
        ImageError: the file is missing, not a regular file, not an image, truncated, or more than
            100 times as long as it is wide.
    """
    with opened(file_name, PathManager.open) as image:
        if least_side is not None:
            image.draft(None, (least_side, least_side))
        return np.ascontiguousarray(convert_PIL_to_numpy(upright(image, orientation), format))


def image_size(file_name: str | os.PathLike[str], orientation: str = "apply") -> tuple[int, int]:
    """Width and height in pixels from the header of an image file, as :func:`read_image` reads it.

    Args:
        file_name: path or address.
        orientation: see :func:`read_image`.

    Raises:
        ImageError: the header shows that the image cannot be read.
    """
    with opened(file_name, PathManager.open) as image:
        width, height = image.size
        check_aspect(image.size)
        if image.format == "TIFF":  # Pillow gives the upright size
            turned = orientation == "ignore" and exif_orientation(image) > 4
        else:
            # A PNG without EXIF data would decode its pixels to look for them.
            turned = orientation == "apply" and "exif" in image.info and exif_orientation(image) > 4
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
