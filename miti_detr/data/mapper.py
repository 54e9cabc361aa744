"""From a Detectron2 dataset dict to the input of the model, with the augmentation of DETR.

The recipe is that of the published Detectron2 wrapper (facebookresearch/detr
``d2/detr/dataset_mapper.py`` at 29901c5): flip, then with probability 1/2 resize and crop, then the
final resize.
"""

import logging
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances

from .images import ORIENTATIONS, ImageError, check_size, image_size, read_image
from .object_masks import object_masks, objects_of
from .resize import FastResize, FastResizeShortestEdge

logger = logging.getLogger(__name__)

_FLIPS = ("none", "horizontal", "vertical")
CROP_PROBABILITY = 0.5  # of the path with the random crop, as published
_MIN_BOX_SIDE = 1e-5  # pixels; boxes of this width or height, or less, are empty (as in Detectron2)


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of ``INPUT``, in the order in which they are applied.

    Args:
        cfg: reads ``INPUT.{MIN,MAX}_SIZE_{TRAIN,TEST}``, ``MIN_SIZE_TRAIN_SAMPLING``,
            ``RANDOM_FLIP`` and ``CROP``.
        is_train: False: only the resize.

    Raises:
        ValueError: if ``INPUT.RANDOM_FLIP`` has no valid value.
    """
    inputs = cfg.INPUT
    if not is_train:
        return [T.ResizeShortestEdge(inputs.MIN_SIZE_TEST, inputs.MAX_SIZE_TEST, "choice")]
    augmentations: list[T.Augmentation] = []
    if inputs.RANDOM_FLIP not in _FLIPS:
        raise ValueError(f"INPUT.RANDOM_FLIP must be one of {_FLIPS}, got {inputs.RANDOM_FLIP!r}")
    if inputs.RANDOM_FLIP != "none":
        augmentations.append(
            T.RandomFlip(
                horizontal=inputs.RANDOM_FLIP == "horizontal",
                vertical=inputs.RANDOM_FLIP == "vertical",
            )
        )
    if inputs.CROP.ENABLED:
        crop = T.AugmentationList(
            [
                FastResizeShortestEdge(inputs.CROP.MIN_SIZE_BEFORE, sample_style="choice"),
                T.RandomCrop(inputs.CROP.TYPE, inputs.CROP.SIZE),
            ]
        )
        augmentations.append(T.RandomApply(crop, prob=CROP_PROBABILITY))
    augmentations.append(
        FastResizeShortestEdge(
            inputs.MIN_SIZE_TRAIN, inputs.MAX_SIZE_TRAIN, inputs.MIN_SIZE_TRAIN_SAMPLING
        )
    )
    return augmentations


class DetrDatasetMapper:
    """Reads an image, augments it, and converts its annotations to boxes and classes.

    Crowds are left out. Boxes are clipped to the image, and empty ones are left out, so an image
    may have no box.
    """

    @configurable
    def __init__(
        self,
        *,
        is_train: bool,
        augmentations: list[T.Augmentation],
        image_format: str,
        orientation: str = "apply",
        with_masks: bool = False,
        least_side: int | None = None,
    ) -> None:
        """Take built parts; ``DetrDatasetMapper(cfg, is_train=...)`` builds them.

        Args:
            is_train: whether to add ``instances``.
            augmentations: applied in order to the image and the boxes.
            image_format: e.g. ``RGB`` or ``BGR``; see
                :func:`~miti_detr.data.images.read_image`.
            orientation: ``apply`` or ``ignore`` the EXIF orientation.
            with_masks: whether to add ``gt_masks``.
            least_side: in pixels, as :func:`~miti_detr.data.images.read_image` takes it.
        """
        self.is_train = is_train
        self.with_masks = with_masks
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.orientation = orientation
        self.least_side = least_side
        mode = "training" if is_train else "inference"
        logger.info("Augmentations in %s: %s", mode, augmentations)

    @classmethod
    def from_config(
        cls, cfg: CfgNode, is_train: bool = True, with_objects: bool = False
    ) -> dict[str, Any]:
        """Parts by config.

        Args:
            cfg: reads ``INPUT``, ``DATASETS.EXIF_ORIENTATION`` and ``MODEL``.
            is_train: augment images as in training, and add ``instances``.
            with_objects: add ``instances`` in any case.

        Raises:
            ValueError: the config asks for keypoints or proposals, or has an impossible value.
        """
        for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
            if cfg.MODEL[key]:
                raise ValueError(
                    f"MODEL.{key} is True, but only boxes and masks are trained. Set it to False"
                )
        return {
            "is_train": is_train or with_objects,
            "augmentations": build_augmentations(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "orientation": get_orientation(cfg),
            "with_masks": cfg.MODEL.MASK_ON,
            "least_side": _largest_resize(cfg) if is_train and not cfg.MODEL.MASK_ON else None,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one dataset dict; it is not changed.

        Args:
            dataset_dict: in Detectron2's format, with ``file_name``; in training with
                ``annotations``, or with ``segments_info`` of a panoptic data set.

        Returns:
            The dict without ``annotations``, with ``height`` and ``width`` of the file, and with

            - ``image``: (3, H, W) uint8, contiguous;
            - ``instances``, in training: ``gt_boxes`` (xyxy in pixels of ``image``),
                ``gt_classes`` (int64) and, if asked for, ``gt_masks`` (``BitMasks``, whichever form
                the annotations have).

        Raises:
            ImageError: the image cannot be read, cannot be augmented, or has another size than the
                dict says; the message names the file.
            ValueError: an object has no mask although masks are asked for.
        """
        output = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        image = self._read(output)
        augmented = T.AugInput(image)
        try:
            transforms = self._decoding(image, output) + self.augmentations(augmented)
        except ValueError as error:
            size = f"{image.shape[1]} x {image.shape[0]}"
            raise ImageError(
                f"The image {output['file_name']}, {size} pixels, cannot be augmented: {error}"
            ) from error
        image = augmented.image
        output["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train:
            objects = objects_of(dataset_dict)
            instances, kept = _to_instances(objects, transforms, image.shape[:2])
            if self.with_masks:
                instances.gt_masks = object_masks(output, kept, transforms, image.shape[:2])
            output["instances"] = instances
        return output

    def _read(self, record: dict[str, Any]) -> np.ndarray:
        """The image of a dict, (H, W, C) uint8; fills in missing ``height`` and ``width``."""
        file, orientation = record["file_name"], self.orientation
        image: np.ndarray = read_image(
            file, self.image_format, orientation, least_side=self.least_side
        )
        height, width = image.shape[:2]
        if self.least_side is not None and min(height, width) >= self.least_side:
            width, height = image_size(file, orientation)  # it may be decoded at a reduced size
        check_size(record, (width, height), orientation)
        record.setdefault("width", width)
        record.setdefault("height", height)
        return image

    @staticmethod
    def _decoding(image: np.ndarray, record: dict[str, Any]) -> T.TransformList:
        """How decoding at a reduced size changes the boxes. Sides are rounded up, boxes are not."""
        height, width = image.shape[:2]
        divisor = round(record["width"] / width)
        reduced = FastResize(divisor * height, divisor * width, height, width)
        return T.TransformList([reduced] if divisor > 1 else [])


def _largest_resize(cfg: CfgNode) -> int:
    """The largest shorter side, in pixels, to which a training image may be resized first."""
    crop = cfg.INPUT.CROP.MIN_SIZE_BEFORE if cfg.INPUT.CROP.ENABLED else ()
    sizes: tuple[int, ...] = (*cfg.INPUT.MIN_SIZE_TRAIN, *crop)
    return max(sizes)


def get_orientation(cfg: CfgNode) -> str:
    """``DATASETS.EXIF_ORIENTATION``.

    Raises:
        ValueError: it is not one of its values.
    """
    value: str = cfg.DATASETS.EXIF_ORIENTATION
    if value not in ORIENTATIONS:
        raise ValueError(f"DATASETS.EXIF_ORIENTATION must be one of {ORIENTATIONS}, got {value!r}")
    return value


def _to_instances(
    annotations: list[dict[str, Any]], transforms: T.TransformList, image_size: tuple[int, int]
) -> tuple[Instances, list[dict[str, Any]]]:
    """Transform the boxes of an image as one array; also return the annotations that are left.

    The same as Detectron2's ``transform_instance_annotations``, ``annotations_to_instances`` and
    ``filter_empty_instances`` for boxes, which work on one annotation after the other.
    """
    annotations = [a for a in annotations if a.get("iscrowd", 0) == 0]
    boxes = transforms.apply_box(_to_xyxy(annotations)).clip(min=0)
    height, width = image_size
    boxes = np.minimum(boxes, (width, height, width, height)).astype(np.float32)
    classes = np.array([a["category_id"] for a in annotations], dtype=np.int64)
    keep = (boxes[:, 2:] - boxes[:, :2] > _MIN_BOX_SIDE).all(1)
    instances = Instances(
        image_size,
        gt_boxes=Boxes(torch.from_numpy(boxes[keep])),
        gt_classes=torch.from_numpy(classes[keep]),
    )
    return instances, [annotation for annotation, k in zip(annotations, keep, strict=True) if k]


def _to_xyxy(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Boxes of annotations, (T, 4) float64 xyxy in pixels of the file."""
    modes = np.array([a["bbox_mode"] for a in annotations], dtype=np.int64)
    xywh = modes == BoxMode.XYWH_ABS
    if not (xywh | (modes == BoxMode.XYXY_ABS)).all():
        rows = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        return np.array(rows, dtype=np.float64)
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    boxes[xywh, 2:] += boxes[xywh, :2]  # BoxMode.convert is slower
    return boxes
