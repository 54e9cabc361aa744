"""Patches of unlabelled images, for pre-training.

Source: dddzg/up-detr ``datasets/selfdet.py`` at 44c0c6e.
"""

import logging
import zlib
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Boxes, Instances
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms

from .images import check_size, read_image
from .mapper import DetrDatasetMapper, build_augmentations, get_orientation

logger = logging.getLogger(__name__)

MIN_SIDE = 8  # pixels: least side of a patch, and least difference from the image's side
PATCH_CLASS = 1  # of two; see miti_detr.modeling.pretrain
_FIRST_NAMED = 10  # skipped images that are named in the log, by each process


def build_mapper(
    cfg: CfgNode, is_train: bool, with_objects: bool = False
) -> "DetrDatasetMapper | PatchDatasetMapper":
    """The mapper of a config: for patches if ``INPUT.PATCHES.NUMBER`` is set, else for objects.

    Args:
        cfg: of the run.
        is_train: augment images as in training.
        with_objects: add ``instances`` in evaluation as well; patches always have them.
    """
    if cfg.INPUT.PATCHES.NUMBER > 0:
        return PatchDatasetMapper(cfg, is_train=is_train)
    return DetrDatasetMapper(cfg, is_train=is_train, with_objects=with_objects)


def sample_patch_boxes(width: int, height: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw boxes in an image; they may overlap.

    Width and height are uniform between 8 pixels and 8 fewer than the image; the position is
    uniform.

    Args:
        width: of the image, pixels.
        height: likewise.
        count: M.
        rng: drawn from.

    Returns:
        (M, 4) int64 xyxy pixels.

    Raises:
        ValueError: a side of the image has 16 pixels or fewer.
    """
    if min(width, height) <= 2 * MIN_SIDE:
        raise ValueError(
            f"it is {width} x {height} pixels; a patch needs at least {2 * MIN_SIDE + 1}"
        )
    w = rng.integers(MIN_SIDE, width - MIN_SIDE, count, endpoint=True)
    h = rng.integers(MIN_SIDE, height - MIN_SIDE, count, endpoint=True)
    x, y = rng.integers(0, width - w), rng.integers(0, height - h)
    return np.stack([x, y, x + w, y + h], axis=1)


def build_patch_transform(size: int, is_train: bool) -> transforms.Compose:
    """The transform of a patch: resize, and in training change of colours and blur.

    Args:
        size: side of the result, pixels.
        is_train: False: only the resize.
    """
    steps: list[Any] = [transforms.Resize((size, size))]
    if is_train:
        steps += [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([_GaussianBlur(0.1, 2.0)], p=0.5),
        ]
    return transforms.Compose(steps)


class PatchDatasetMapper:
    """Reads an image, and draws patches and their boxes.

    Annotations are ignored. An image that cannot be read, or is too small for a patch, is skipped
    (None) and counted in the log. In evaluation, the patches of an image are always the same.

    Attributes:
        skipped: images skipped by this copy of the mapper.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: list[T.Augmentation],
        image_format: str,
        orientation: str = "apply",
        num_patches: int,
        patch_size: int,
    ) -> None:
        """Take built parts; ``PatchDatasetMapper(cfg, is_train=...)`` builds them.

        Args:
            is_train: draw other patches each time, and change their colours.
            augmentations: applied to the image, not to the patches; none may cut off a box.
            image_format: ``RGB`` or ``BGR``.
            orientation: ``apply`` or ``ignore`` the EXIF orientation.
            num_patches: M.
            patch_size: side of a patch in the output, pixels.

        Raises:
            ValueError: another format.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {image_format!r}; patches need RGB or BGR")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.orientation = orientation
        self.num_patches = num_patches
        self.transform = build_patch_transform(patch_size, is_train)
        self.skipped = 0
        mode = "training" if is_train else "inference"
        logger.info("%d patches of each image in %s: %s", num_patches, mode, self.transform)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Parts by config."""
        return {
            "is_train": is_train,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "orientation": get_orientation(cfg),
            "num_patches": cfg.INPUT.PATCHES.NUMBER,
            "patch_size": cfg.INPUT.PATCHES.SIZE,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Map one dataset dict; it is not changed.

        Args:
            dataset_dict: in Detectron2's format, with ``file_name``.

        Returns:
            None for an image that is skipped; else the dict without ``annotations``, with
            ``height`` and ``width`` of the file, and with

            - ``image``: (3, H, W) uint8, contiguous;
            - ``patches``: (M, 3, size, size) uint8;
            - ``instances``: ``gt_boxes`` (xyxy in pixels of ``image``) of the patches in their
                order, and ``gt_classes``;
            - ``patch_boxes``: (M, 4) the same, xyxy in pixels of the file.
        """
        output = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        file = output["file_name"]
        try:
            image = read_image(file, "RGB", self.orientation)
            height, width = image.shape[:2]
            check_size(output, (width, height), self.orientation)
            boxes = sample_patch_boxes(width, height, self.num_patches, self._rng(file))
            augmented = T.AugInput(image)
            moves = self.augmentations(augmented)
        except Exception as error:  # which ones depends on the decoder
            self._skip(file, error)
            return None
        output |= {"height": height, "width": width}
        picture = Image.fromarray(image)
        patches = [self._to_tensor(self.transform(picture.crop(box))) for box in boxes.tolist()]
        output["patches"] = torch.stack(patches)
        output["image"] = self._to_tensor(Image.fromarray(augmented.image))
        output["instances"] = Instances(
            augmented.image.shape[:2],
            # Detectron2's transforms would round integers.
            gt_boxes=Boxes(torch.from_numpy(moves.apply_box(boxes.astype(float))).float()),
            gt_classes=torch.full((len(boxes),), PATCH_CLASS),
        )
        output["patch_boxes"] = torch.from_numpy(boxes)
        return output

    def _rng(self, file: str) -> np.random.Generator:
        """Seeded by the loader in training, otherwise by the file's name."""
        if self.is_train:
            return np.random.default_rng(np.random.randint(2**31))
        return np.random.default_rng(zlib.crc32(file.rpartition("/")[2].encode()))

    def _skip(self, file: str, error: Exception) -> None:
        self.skipped += 1
        if self.skipped <= _FIRST_NAMED or self.skipped % 1000 == 0:
            logger.warning("skipped %s: %s (%d skipped so far)", file, error, self.skipped)

    def _to_tensor(self, picture: Image.Image) -> Tensor:
        array = convert_PIL_to_numpy(picture, self.image_format)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


class _GaussianBlur:
    """Gaussian blur of random width; torchvision's needs a kernel size instead."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, picture: Image.Image) -> Image.Image:
        sigma = np.random.uniform(self.low, self.high)
        return picture.filter(ImageFilter.GaussianBlur(sigma))

    def __repr__(self) -> str:
        return f"GaussianBlur({self.low}, {self.high})"
