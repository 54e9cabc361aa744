"""Masks of the objects of an image, in the frame of the augmented image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import polygons_to_bitmask, read_image
from detectron2.structures import BitMasks, BoxMode
from pycocotools import mask as mask_util

from .images import ImageError

SEGMENTS = "pan_seg_file_name"  # of a panoptic record: its file of segment ids


def objects_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The annotations of a dataset dict; those of a panoptic one are its segments.

    Args:
        record: in Detectron2's format, for objects (``annotations``) or panoptic segmentation
            (``segments_info``, with boxes as in COCO's files).

    Returns:
        Detectron2 annotations; those of segments with ``segment_id``.
    """
    if SEGMENTS not in record:
        annotations: list[dict[str, Any]] = record.get("annotations", [])
        return annotations
    return [
        {
            "segment_id": segment["id"],
            "bbox": segment["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": segment["category_id"],
            "iscrowd": segment.get("iscrowd", 0),
        }
        for segment in record["segments_info"]
    ]


def object_masks(
    record: dict[str, Any],
    annotations: Sequence[dict[str, Any]],
    transforms: T.TransformList,
    image_size: tuple[int, int],
) -> BitMasks:
    """Masks of some objects of an image.

    Polygons are moved first and then filled, so their masks have the edges of the new pixels.
    Run-length encodings and segments are resized to the nearest pixel.

    Args:
        record: of :func:`objects_of`.
        annotations: some of what :func:`objects_of` returns.
        transforms: that the image went through.
        image_size: height and width of the result.

    Raises:
        ValueError: an annotation has no mask.
        ImageError: the file of segments cannot be read, or has another size than the image.
    """
    masks = np.zeros((len(annotations), *image_size), dtype=bool)
    segments = transforms.apply_segmentation(_segments(record)) if SEGMENTS in record else None
    ids = None if segments is None else segment_ids(segments)
    for mask, annotation in zip(masks, annotations, strict=True):
        if ids is not None:
            mask[:] = ids == annotation["segment_id"]
            continue
        shape = annotation.get("segmentation")
        if shape is None or len(shape) == 0:
            raise ValueError(
                f"MODEL.MASK_ON is True, but an object of {record.get('file_name')} has no "
                "'segmentation'. Add it, or set MODEL.MASK_ON False"
            )
        if isinstance(shape, dict):
            mask[:] = transforms.apply_segmentation(_decode(shape))
        else:
            points = [np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in shape]
            polygons = [transforms.apply_coords(part).ravel() for part in points]
            mask[:] = polygons_to_bitmask(polygons, *image_size)
    return BitMasks(torch.from_numpy(masks))


def segment_ids(pixels: np.ndarray) -> np.ndarray:
    """Segment ids (H, W) int64 of COCO's panoptic colours (H, W, 3): R + 256 G + 256^2 B."""
    return pixels.astype(np.int64) @ np.array([1, 256, 256**2])


def ids_to_colours(ids: np.ndarray) -> np.ndarray:
    """Undo :func:`segment_ids`: colours (H, W, 3) uint8 of ids (H, W) in [0, 256^3)."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)


def _segments(record: dict[str, Any]) -> np.ndarray:
    """The colours of the segments of a panoptic record, (H, W, 3) uint8."""
    path = record[SEGMENTS]
    try:
        pixels: np.ndarray = read_image(path, "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"The segments {path} cannot be read: {error}") from error
    expected = (record["height"], record["width"])
    if pixels.shape[:2] != expected:
        raise ImageError(
            f"The segments {path} have {pixels.shape[1]} x {pixels.shape[0]} pixels, the image "
            f"{record['file_name']} has {expected[1]} x {expected[0]}"
        )
    return pixels


def _decode(runs: dict[str, Any]) -> np.ndarray:
    if isinstance(runs["counts"], list):
        runs = mask_util.frPyObjects(runs, *runs["size"])
    mask: np.ndarray = mask_util.decode(runs)
    return mask
