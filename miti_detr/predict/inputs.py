"""Images of any kind as arrays: paths, Pillow images, NumPy arrays, tensors."""

import os
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from miti_detr.pictures import check_aspect, decode, read_picture

CHANNELS = ("RGB", "BGR")


class Source(NamedTuple):
    """An image as the user gave it.

    Attributes:
        image: path, Pillow image, array or tensor.
        channels: order of the channels of an array or tensor; None: not stated.
        orientation: ``apply`` the EXIF orientation of a file or Pillow image, or ``ignore`` it.
    """

    image: Any
    channels: str | None = None
    orientation: str = "apply"

    def read(self, channels: str) -> np.ndarray:
        """Read the pixels, see :func:`to_array`."""
        return to_array(self.image, channels, given=self.channels, orientation=self.orientation)


def to_array(
    image: Any, channels: str, *, given: str | None = None, orientation: str = "apply"
) -> np.ndarray:
    """Read one image.

    Args:
        image: path; Pillow image; NumPy array (H, W), (H, W, 1) or (H, W, 3); or tensor (1, H, W)
            or (3, H, W). Values of arrays and tensors are in 0..255, of any real type.
        channels: order of the result, ``RGB`` or ``BGR``.
        given: order of an array or tensor with three channels.
        orientation: ``apply`` the EXIF orientation of a file or Pillow image, or ``ignore`` it.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        ImageError: a file cannot be read.
        TypeError: it is none of these.
        ValueError: the shape, the values or ``given`` are not possible.
    """
    if given not in (None, *CHANNELS):
        raise ValueError(f"channels is {given!r}. Use RGB or BGR.")
    if isinstance(image, str | os.PathLike):
        return read_picture(image, channels, orientation)
    if isinstance(image, Image.Image):
        return decode(image, channels, orientation)
    array = _pixels(image)
    if array.shape[2] == 1:
        return np.ascontiguousarray(np.repeat(array, 3, axis=2))
    if given is None:
        raise ValueError(
            "an array does not say the order of its channels. Add channels='RGB', or "
            "channels='BGR' for images that OpenCV has read."
        )
    return np.ascontiguousarray(array if given == channels else array[:, :, ::-1])


def _pixels(image: Any) -> np.ndarray:
    """An array or tensor as (H, W, 1 or 3) uint8."""
    if hasattr(image, "detach"):  # a tensor of torch, which need not be installed
        array = image.detach().cpu().numpy()
        array = array.transpose(1, 2, 0) if array.ndim == 3 else array
    elif isinstance(image, np.ndarray):
        array = image[:, :, None] if image.ndim == 2 else image
    else:
        raise TypeError(
            f"an image is a {type(image).__name__}. Give a path, a Pillow image, a NumPy array or "
            "a tensor."
        )
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(
            f"an image has shape {tuple(image.shape)}. Give arrays as (H, W, 3) or (H, W), tensors "
            "as (3, H, W) or (1, H, W), and several images as a list."
        )
    check_aspect((array.shape[1], array.shape[0]))
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool or array.dtype.kind not in "uif":
        raise ValueError(f"an image holds {array.dtype}. Its values must be numbers in 0..255.")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255) or (array.dtype.kind == "f" and 0 < high <= 1):
        raise ValueError(
            f"the values of an image are in {low:.4g}..{high:.4g}. Scale them to 0..255."
        )
    return array.round().astype(np.uint8)
