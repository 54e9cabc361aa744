"""Images without labels: folders of images as data sets, and their checks."""

import logging
import os
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .coco_format import forget_earlier, is_entry, prepare_files
from .images import IMAGE_SUFFIXES, ImageError, find_faults, image_size
from .patches import MIN_SIDE

logger = logging.getLogger(__name__)


def register_unlabeled(cfg: CfgNode) -> None:
    """Register the image folders of a config with Detectron2.

    These are the entries ``[name, image folder]`` of ``DATASETS.UNLABELED`` and of
    ``DATASETS.COCO_FORMAT``. All images in the folder and below it belong to the data set. Nothing
    is read yet. As an override::

        DATASETS.UNLABELED "[['photos', 'data/photos']]" DATASETS.TRAIN "('photos',)"

    Args:
        cfg: every process calls this with the same config. Calling it again with the same entries
            changes nothing.

    Raises:
        ValueError: an entry of ``UNLABELED`` is not such a pair, or its name belongs to another
            data set.
    """
    entries = cfg.DATASETS.UNLABELED
    for entry in entries:
        if not is_entry(entry, 2):
            raise ValueError(
                "DATASETS.UNLABELED must be a list of [name, image folder], such as "
                f"\"[['photos','images']]\"; got the entry {entry!r}"
            )
    for entry in (*entries, *(e for e in cfg.DATASETS.COCO_FORMAT if is_entry(e, 2))):
        name, root = entry[0], os.path.abspath(os.path.expanduser(entry[1]))
        forget_earlier("DATASETS.UNLABELED", name, ("", root))
        DatasetCatalog.register(name, partial(list_images, root))
        MetadataCatalog.get(name).set(image_root=root, coco_format=("", root))


def list_images(root: str) -> list[dict[str, Any]]:
    """Dataset dicts of all images in a folder and below it, in the order of their paths.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder has no images.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"DATASETS.UNLABELED: the folder {root} does not exist")
    files = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    )
    if not files:
        raise ValueError(f"DATASETS.UNLABELED: {root} has no images ({' '.join(IMAGE_SUFFIXES)})")
    return [{"file_name": file, "image_id": index} for index, file in enumerate(files)]


def check_unlabeled(names: list[str]) -> None:
    """Check data sets whose labels are ignored, and count the images that will be skipped.

    Args:
        names: of registered data sets.

    Raises:
        ValueError: a name is not registered, or no image of a data set can be used.
        FileNotFoundError: a folder does not exist.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise ValueError(
                f"The data set {name!r} is not registered. Correct DATASETS.TRAIN or "
                "DATASETS.TEST, or add [name, image folder] to DATASETS.UNLABELED"
            )
        prepare_files(name)
        files = [record["file_name"] for record in DatasetCatalog.get(name)]
        faults, opened = find_faults(files, _fault)
        if len(faults) == opened:
            raise ValueError(f"The data set {name!r} has no image that can be used: {faults[0]}")
        logger.info("%s: %d images; their labels are not used", name, len(files))
        if faults:
            logger.warning(
                "%s: %d of %d images checked will be skipped. The first: %s",
                name,
                len(faults),
                opened,
                faults[0],
            )


def _fault(file: str) -> str:
    """Why an image will be skipped, as far as its header shows, or ""."""
    if "://" in file:
        return ""
    try:
        size = image_size(file)
    except ImageError as error:
        return str(error)
    small = min(size) <= 2 * MIN_SIDE
    return (
        f"The image {file} is {size[0]} x {size[1]} pixels, too small for a patch" if small else ""
    )
