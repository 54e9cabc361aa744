"""Inference on images in memory: the config of a checkpoint, and a predictor that takes a batch."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from torch import nn

from miti_detr.checkpoint import MitiDetrCheckpointer, read_checkpoint
from miti_detr.checkpoint.files import TRUST_KEY
from miti_detr.checkpoint.variant import RECORD_KEY
from miti_detr.data import read_image
from miti_detr.yaml_files import parse_config

from .setup import setup_config

# A recorded config is data: it starts no download and opens no other file.
_FOR_RECORDED = (
    *("MODEL.TIMM.PRETRAINED", "False", TRUST_KEY, "False", "MODEL.DETR.FROZEN_WEIGHTS", "''"),
)
_TIMM_NAME = re.compile(r"[\w.\-]+")  # names such as "hf-hub:..." are addresses


def load_config(
    config_file: str | None = None, *, weights: str, overrides: Sequence[str] = ()
) -> CfgNode:
    """Read the config of a trained model.

    Args:
        config_file: YAML file; None takes the config that is recorded in ``weights``.
        weights: checkpoint; becomes ``MODEL.WEIGHTS``.
        overrides: alternating keys and values, applied last.

    Returns:
        The frozen config, as :func:`~miti_detr.engine.setup.setup_config` reads it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is neither a config file nor a recorded config, or a key or its value is
            not possible.
    """
    # A GPU's precision would be refused on a CPU, compiling for images of every size takes long,
    # and test-time augmentation takes many passes: all belong to training. Overrides may still ask
    # for them.
    training = (
        *("SOLVER.AMP.ENABLED", "False", "MODEL.COMPILE", "False"),
        *("MODEL.CUDA_GRAPHS", "False", "TEST.AUG.ENABLED", "False"),
    )
    if config_file is not None:
        cfg = setup_config(config_file, ["MODEL.WEIGHTS", weights, *training, *overrides])
    else:
        options = ["MODEL.WEIGHTS", weights, *training, *_FOR_RECORDED, *overrides]
        trusted = dict(zip(options[::2], options[1::2], strict=False)).get(TRUST_KEY) == "True"
        name = f"the config recorded in {weights}"
        cfg = setup_config(_recorded_config(weights, trusted, name), options, source=name)
    cfg.freeze()
    return cfg


def _recorded_config(weights: str, trusted: bool, name: str) -> dict[str, Any]:
    checkpoint = read_checkpoint(PathManager.get_local_path(weights), trust=trusted)
    record = checkpoint.get(RECORD_KEY)
    if not isinstance(record, dict) or not record.get("config"):
        raise ValueError(f"{weights} records no config. Name its YAML file with --config-file.")
    content = parse_config(record["config"], name)
    timm: Any = content
    for key in ("MODEL", "TIMM", "NAME"):
        timm = timm.get(key) if isinstance(timm, dict) else None
    if isinstance(timm, str) and not _TIMM_NAME.fullmatch(timm):
        raise ValueError(
            f"{name}: MODEL.TIMM.NAME is {timm!r}, which is not the name of a model inside timm. "
            "Name the YAML file with --config-file if you trust it."
        )
    return content


class Predictor:
    """Predicts batches of images as they come from a file.

    Differs from :class:`detectron2.engine.DefaultPredictor` in three points: it takes a batch, the
    images are in the model's own channel order, and the results are on the CPU.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        resize: T.Augmentation,
        input_format: str,
        orientation: str = "apply",
    ) -> None:
        """Take the built parts; ``Predictor(cfg)`` builds them from a config.

        Args:
            model: takes Detectron2's list of inputs, returns ``{"instances": Instances}`` for each.
            resize: geometric change from the image to the network's input.
            input_format: channel order of the images, ``BGR`` or ``RGB``.
            orientation: ``apply`` or ``ignore`` the EXIF orientation of image files.
        """
        self.model = model.eval()
        self.resize = resize
        self.input_format = input_format
        self.orientation = orientation

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the model, load ``MODEL.WEIGHTS``, and resize as the evaluation of ``cfg`` does."""
        model = build_model(cfg)
        MitiDetrCheckpointer(model, cfg=cfg).load(cfg.MODEL.WEIGHTS)
        shortest = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
        return {
            "model": model,
            "resize": T.ResizeShortestEdge(shortest, cfg.INPUT.MAX_SIZE_TEST),
            "input_format": cfg.INPUT.FORMAT,
            "orientation": cfg.DATASETS.EXIF_ORIENTATION,
        }

    def read(self, path: str | Path) -> np.ndarray:
        """Read an image file as the training did: (H, W, 3), uint8, in ``input_format``.

        Raises:
            ImageError: the file cannot be read as an image.
        """
        array: np.ndarray = read_image(str(path), self.input_format, self.orientation)
        return array

    def __call__(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Detect objects in one batch.

        Args:
            images: arrays (H, W, 3), uint8, channels in ``input_format``; sizes may differ.

        Returns:
            For each image its detections, on the CPU, unfiltered: ``pred_boxes`` (xyxy, pixels of
            the image as given), ``scores`` in [0, 1], ``pred_classes`` (contiguous), and
            ``pred_masks`` if the model has masks.

        Raises:
            ValueError: an image has another shape.
        """
        return [output["instances"].to("cpu") for output in self.outputs(images)]

    def outputs(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Run the model on one batch; arguments and errors as for :meth:`__call__`.

        Returns:
            What the model returns for each image: ``instances``, and ``panoptic_seg`` of a panoptic
            model, on its device.
        """
        if not images:
            return []
        inputs = [self.prepare(image, index) for index, image in enumerate(images)]
        with torch.no_grad():
            outputs: list[dict[str, Any]] = self.model(inputs)
        return outputs

    def prepare(self, image: np.ndarray, index: int = 0) -> dict[str, Any]:
        """Turn one image into what the model takes.

        Args:
            image: as for :meth:`__call__`.
            index: of the image, for the error.
        """
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image {index} has shape {image.shape}; needed: (H, W, 3)")
        height, width = image.shape[:2]
        transform = self.resize.get_transform(image)
        if isinstance(transform, T.ResizeTransform):  # of a very thin image a side becomes 0
            transform.new_h, transform.new_w = max(transform.new_h, 1), max(transform.new_w, 1)
        resized = transform.apply_image(image)
        # A copy in (3, H, W) order: a view would be channels_last, which convolutions treat apart.
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}
