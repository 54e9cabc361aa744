"""Which pixel mean, deviation and channel order weights were trained with, as far as one can tell.

Wrong ones raise no error; they only cost accuracy. So they are compared, and a warning is logged.
Sources: Detectron2 ``config/defaults.py`` and ``model_zoo``, torchvision's ImageNet models,
facebookresearch/detr ``datasets/coco.py``, timm's ``tf_efficientnet_lite0``.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n


class Pixels(NamedTuple):
    """How images are normalised, in units of 0..255.

    Attributes:
        mean: per channel.
        std: per channel.
        channels: ``RGB`` or ``BGR``; "": not known.
    """

    mean: Sequence[float]
    std: Sequence[float]
    channels: str = ""

    @classmethod
    def of_config(cls, cfg: CfgNode) -> "Pixels":
        """Read how the model of a config takes images."""
        return cls(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT)


TORCHVISION = Pixels((123.675, 116.280, 103.530), (58.395, 57.120, 57.375), "RGB")
CAFFE2 = Pixels((103.530, 116.280, 123.675), (1.0, 1.0, 1.0), "BGR")  # std is in the weights
TENSORFLOW = Pixels((127.5, 127.5, 127.5), (127.5, 127.5, 127.5), "RGB")
_SCALED_BGR = Pixels((103.530, 116.280, 123.675), (57.375, 57.120, 58.395), "BGR")

# Parts of paths, the special ones first.
_BY_NAME = (
    ("ImageNetPretrained/torchvision/", TORCHVISION),
    ("X-101-32x8d", _SCALED_BGR),
    ("ImageNetPretrained/", CAFFE2),
    ("download.pytorch.org/models/resnet", TORCHVISION),
    ("dl.fbaipublicfiles.com/detr/", TORCHVISION),
    ("package://efficientnet_lite0", TENSORFLOW),
)
# Keys of SOURCES in checkpoint/sources.py. A Detectron2 ResNet may be of either kind.
_BY_SOURCE = dict.fromkeys(
    ("torchvision_resnet", "detr", "detr_panoptic", "up_detr_pretrain")
    + ("d2_wrapper", "d2_wrapper_panoptic", "hf", "hf_panoptic")
    + ("deformable_detr", "hf_deformable"),
    TORCHVISION,
)
_BY_AUTHOR = {"torchvision": TORCHVISION, "Caffe2": CAFFE2}


def expected_pixels(path: str, *, source: str | None = None, author: str = "") -> Pixels | None:
    """Find out how images were normalised for weights.

    Args:
        path: of the file, or its URL.
        source: format of its keys, if it is known (a key of ``SOURCES``).
        author: ``__author__`` of a ``.pkl`` file, or "".

    Returns:
        None if nothing tells.
    """
    named = next((pixels for part, pixels in _BY_NAME if part in path), None)
    return named or _BY_SOURCE.get(source or "") or _BY_AUTHOR.get(author)


def warn_if_pixels_differ(weights: str, expected: Pixels | None, used: Pixels) -> None:
    """Warn, once for each pair, if a model normalises images otherwise than its weights need.

    Args:
        weights: their name, for the message.
        expected: of the weights; None: not known, no message.
        used: by the model.
    """
    if expected is None or _agree(expected, used):
        return
    log_first_n(
        logging.WARNING,
        f"{weights} was trained on {_words(expected)}, this model takes {_words(used)}: set "
        f"MODEL.PIXEL_MEAN {_rounded(expected.mean)} MODEL.PIXEL_STD {_rounded(expected.std)}"
        + (f" INPUT.FORMAT {expected.channels}" if expected.channels else ""),
        name="miti_detr.modeling",
        key="message",
    )


def _agree(expected: Pixels, used: Pixels) -> bool:
    close = all(
        abs(a - b) <= tolerance
        for tolerance, left, right in (
            (1.0, expected.mean, used.mean),
            (0.5, expected.std, used.std),
        )
        for a, b in zip(left, right, strict=False)
    )
    known = expected.channels and used.channels
    return close and (not known or expected.channels == used.channels)


def _words(pixels: Pixels) -> str:
    channels = f"{pixels.channels} " if pixels.channels else ""
    return f"{channels}images with mean {_rounded(pixels.mean)} and std {_rounded(pixels.std)}"


def _rounded(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"
