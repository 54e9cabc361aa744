"""Features of a frozen backbone, computed once for a few variants of each training image.

A frozen backbone computes the same features in each pass over the data. With
``MODEL.BACKBONE.CACHE_FEATURES`` n, the augmentation of each image is drawn n times; the features
and objects of these variants are written to files, and training reads them instead of images.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from miti_detr.files import replacing

from .images import ImageError
from .loader import seeded
from .mapper import DetrDatasetMapper

_VERSION = 1  # of the files
_DTYPE = torch.float16  # of the features in the files


class FeatureStore:
    """A mapper that reads the features of a variant of an image, which it draws.

    The files are in the folder ``features`` of Detectron2's data sets (``DETECTRON2_DATASETS``).
    Their names depend on the image file, its objects, the augmentation, the backbone's weights and
    the pixel statistics, so a change of any of them leads to other files. Runs share them whatever
    their seeds and transformers are. The folder can be deleted at any time.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Take the config.

        Raises:
            ValueError: the config asks for masks or patches, which need images.
        """
        for key, asked in (
            ("MODEL.MASK_ON", cfg.MODEL.MASK_ON),
            ("INPUT.PATCHES.NUMBER", cfg.INPUT.PATCHES.NUMBER),
        ):
            if asked:
                raise ValueError(
                    f"MODEL.BACKBONE.CACHE_FEATURES keeps no images, and {key} is {asked}. Set "
                    "MODEL.BACKBONE.CACHE_FEATURES 0"
                )
        self.num_variants: int = cfg.MODEL.BACKBONE.CACHE_FEATURES
        self._mapper = DetrDatasetMapper(cfg, is_train=True)
        self._config = [cfg.INPUT.dump(), cfg.DATASETS.EXIF_ORIENTATION, _VERSION]
        self._folder = Path(os.getenv("DETECTRON2_DATASETS", "datasets"), "features")
        self._key = ""

    def open(self, key: str) -> None:
        """Choose the files.

        Args:
            key: differs for each backbone, its weights and what is done to the pixels.
        """
        self._key = key

    def variant(self, record: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Augment an image as in training; always the same for the same number."""
        seed = int(self._name(record, number)[:8], 16)
        with seeded(seed, seed, seed):
            return self._mapper(dict(record))

    def has(self, record: Mapping[str, Any], number: int) -> bool:
        """Say whether the features of a variant are there."""
        return self._path(record, number).is_file()

    def write(
        self, record: Mapping[str, Any], number: int, mapped: Any, features: dict[str, Tensor]
    ) -> None:
        """Write the features (C', h, w) of a variant and its objects, whole or not at all."""
        objects: Instances = mapped["instances"]
        content = {
            "features": {name: x.to("cpu", _DTYPE).clone() for name, x in features.items()},
            "size": tuple(mapped["image"].shape[-2:]),
            "boxes": objects.gt_boxes.tensor,
            "classes": objects.gt_classes,
        }
        with replacing(self._path(record, number)) as path:
            torch.save(content, path)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read a variant.

        Returns:
            The record without its annotations, with ``features``: (C', h, w) by name, ``size``:
            height and width of the variant in pixels, and ``instances``.
        """
        path = self._path(record, int(np.random.randint(self.num_variants)))
        try:
            kept = torch.load(path, weights_only=True)
        except Exception as error:  # which ones depends on what has happened to the file
            raise ImageError(
                f"The features {path} of {record['file_name']} cannot be read. Delete that file "
                "and start again"
            ) from error
        output = {key: value for key, value in record.items() if key != "annotations"}
        objects = Instances(kept["size"])
        objects.gt_boxes = Boxes(kept["boxes"])
        objects.gt_classes = kept["classes"]
        return {
            **output,
            "features": kept["features"],
            "size": kept["size"],
            "instances": objects,
        }

    def _path(self, record: Mapping[str, Any], number: int) -> Path:
        return self._folder / self._key / f"{self._name(record, number)}.pt"

    def _name(self, record: Mapping[str, Any], number: int) -> str:
        """Digest of all that determines a variant of an image, except for the backbone."""
        file = record["file_name"]
        status = os.stat(file)
        parts = [file, status.st_size, status.st_mtime_ns, record.get("annotations"), number]
        return digest([*self._config, *parts])


def digest(parts: list[Any]) -> str:
    """Hash of plain values, 20 hexadecimal digits."""
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
