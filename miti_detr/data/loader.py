"""Data loaders whose stream depends on the config only.

The stream is the same for any number of workers and processes, and after a resume.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    trivial_batch_collator,
)
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset

from miti_detr.class_count import num_classes

from .coco.annotations import drop_faulty
from .images import ImageError
from .patches import build_mapper
from .sampler import SeededBatchSampler, sample_seeds

logger = logging.getLogger(__name__)

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]

BAD_IMAGES = ("error", "skip")
_DATA_SET = "miti_detr_data_set"  # key of a record inside the loader
_FIRST_NAMED = 10  # skipped images that each process names in the log


def build_train_loader(
    cfg: CfgNode, mapper: Mapper | None = None, start_iter: int = 0
) -> DataLoader[Any]:
    """Endless training batches.

    The batch of an iteration, with its augmentation, is a pure function of ``SEED``, the iteration
    and the files: it does not depend on ``DATALOADER.NUM_WORKERS`` nor, taken over all processes,
    on their number. The random state of the calling process does not change.

    Args:
        cfg: the data sets of ``DATASETS.TRAIN``; ``SOLVER.IMS_PER_BATCH`` images in all processes
            together. With ``DATASETS.BAD_IMAGES skip``, the next image that can be read takes the
            place of one that cannot.
        mapper: called with a dataset dict; None: that of :func:`build_mapper`. It may draw from
            ``random``, ``numpy.random`` and ``torch``, all of which are seeded for each sample, and
            may return None to skip to the next image.
        start_iter: the first iteration. ``loader.batch_sampler.start_iter`` may be set until the
            iteration begins.

    Returns:
        A loader of lists of what the mapper returns, ``IMS_PER_BATCH / processes`` long.

    Raises:
        ValueError: a key has a value that this loader does not support.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN!r} is not supported, "
            "because its order cannot be resumed at an iteration. Use 'TrainingSampler'"
        )
    dicts = training_records(cfg)
    sampler = SeededBatchSampler(
        groups=_aspect_groups(dicts) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else [0] * len(dicts),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=cfg.SEED,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        start_iter=start_iter,
    )
    mapper = build_mapper(cfg, is_train=True) if mapper is None else mapper
    dataset = _SeededDataset(_MappedImages(cfg, dicts, mapper), cfg.SEED)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        **_loader_arguments(cfg),
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
    )


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """Dataset dicts of the images that are trained on, in the order of the data sets."""
    dicts = _share(_load_dicts(cfg, list(cfg.DATASETS.TRAIN)), cfg.DATASETS.TRAIN_SHARE)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and "annotations" in dicts[0]:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    return dicts


def build_test_loader(
    cfg: CfgNode, dataset_name: str, mapper: Mapper | None = None
) -> DataLoader[Any]:
    """Batches of this process' share of a data set, in order or grouped by shape.

    Args:
        cfg: ``TEST.IMS_PER_BATCH`` images in each batch. With more than one, images of similar
            shape come together, to save padding; where records have no size, they stay in order.
            With ``DATASETS.BAD_IMAGES skip``, the next image that can be read takes the place of
            one that cannot, and so comes twice.
        dataset_name: a registered data set.
        mapper: None: that of :func:`build_mapper` for inference, with the objects that a validation
            loss (``TEST.LOSS``) needs.

    Returns:
        A loader of lists of what the mapper returns; the last one may be shorter.
    """
    dicts = _load_dicts(cfg, [dataset_name])
    for index, record in enumerate(dicts):
        record.setdefault("image_id", index)  # as Detectron2 numbers them for the evaluator
    if cfg.TEST.IMS_PER_BATCH > 1:
        dicts = sorted(dicts, key=_shape)
    if mapper is None:
        mapper = build_mapper(cfg, is_train=False, with_objects=cfg.TEST.LOSS)
    return DataLoader(
        _MappedImages(cfg, dicts, mapper),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        sampler=InferenceSampler(len(dicts)),
        **_loader_arguments(cfg),
    )


class _MappedImages(Dataset[dict[str, Any]]):
    """Maps the image at an index, or the next one that can be mapped."""

    def __init__(self, cfg: CfgNode, dicts: list[dict[str, Any]], mapper: Mapper) -> None:
        self._records = DatasetFromList(dicts, copy=False)
        self._mapper = PicklableWrapper(mapper)
        self._skip = get_bad_images(cfg) == "skip"
        self._skipped = 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, first: int) -> dict[str, Any]:
        for index in range(first, first + len(self)):
            mapped = self._map(self._records[index % len(self)])
            if mapped is not None:
                return mapped
        raise ImageError("no image of the data set can be used: the mapper skipped every one")

    def _map(self, record: dict[str, Any]) -> dict[str, Any] | None:
        name = record.pop(_DATA_SET)
        try:
            mapped: dict[str, Any] | None = self._mapper(record)
            return mapped
        except ImageError as error:
            message = f"data set {name!r}: {error}"
            if not self._skip:
                advice = "Replace it, or skip such images with DATASETS.BAD_IMAGES skip"
                raise ImageError(f"{message}. {advice}") from error
        self._skipped += 1
        if self._skipped <= _FIRST_NAMED or self._skipped % 1000 == 0:
            logger.warning("skipped: %s (%d skipped by this process)", message, self._skipped)
        return None


class _SeededDataset(Dataset[dict[str, Any]]):
    """Maps the image at an index, with all generators seeded by the position of the sample."""

    def __init__(self, images: _MappedImages, seed: int) -> None:
        self._images = images
        self._seed = seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, sample: tuple[int, int]) -> dict[str, Any]:
        position, index = sample
        with seeded(*sample_seeds(self._seed, position)):
            return self._images[index]


@contextmanager
def seeded(numpy_seed: int, python_seed: int, torch_seed: int) -> Iterator[None]:
    """Seed the global generators, and restore their states afterwards."""
    # Only torch's default generator; torch.manual_seed would seed the accelerators as well
    states = np.random.get_state(), random.getstate(), torch.default_generator.get_state()
    np.random.seed(numpy_seed)
    random.seed(python_seed)
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
        torch.default_generator.set_state(states[2])


def _load_dicts(cfg: CfgNode, names: list[str]) -> list[dict[str, Any]]:
    """Dataset dicts, without their faulty annotations where the config says so."""
    dicts: list[dict[str, Any]] = []
    for name in names:
        found = get_detection_dataset_dicts([name], filter_empty=False, check_consistency=False)
        if not isinstance(found, list):
            raise ValueError(
                f"The data set {name!r} is a {type(found).__name__}. Register a function that "
                "returns a list of dicts"
            )
        if cfg.INPUT.PATCHES.NUMBER > 0:  # its labels are not used
            found = [{k: v for k, v in d.items() if k != "annotations"} for d in found]
        elif cfg.DATASETS.BAD_ANNOTATIONS == "drop":
            classes = MetadataCatalog.get(name).get("thing_classes", ())
            found = drop_faulty(
                found, len(classes) or num_classes(cfg), with_masks=cfg.MODEL.MASK_ON
            )
        dicts += [{**record, _DATA_SET: name} for record in found]
    return dicts


def get_bad_images(cfg: CfgNode) -> str:
    """``DATASETS.BAD_IMAGES``.

    Raises:
        ValueError: it is not one of its values.
    """
    value: str = cfg.DATASETS.BAD_IMAGES
    if value not in BAD_IMAGES:
        raise ValueError(f"DATASETS.BAD_IMAGES must be one of {BAD_IMAGES}, got {value!r}")
    return value


def _share(dicts: list[dict[str, Any]], share: float) -> list[dict[str, Any]]:
    """An evenly spread part of the images, at least one."""
    if not 0 < share <= 1:
        raise ValueError(f"DATASETS.TRAIN_SHARE is {share}. It must be above 0 and at most 1")
    count = max(1, round(share * len(dicts)))
    return [dicts[index * len(dicts) // count] for index in range(count)]


def _aspect_groups(dicts: list[dict[str, Any]]) -> list[int]:
    """0 for images that are wider than high, 1 for the others."""
    for record in dicts:
        if "width" not in record or "height" not in record:
            raise ValueError(
                f"{record.get('file_name', 'An image')} has no width and height in its data set. "
                "Add them, or set DATALOADER.ASPECT_RATIO_GROUPING False"
            )
    return [0 if record["width"] > record["height"] else 1 for record in dicts]


def _shape(record: dict[str, Any]) -> tuple[float, float]:
    """Sort key: aspect ratio, which decides the shape of a resized image, then size."""
    width, height = record.get("width", 0), record.get("height", 0)
    return width / max(height, 1), height


def _loader_arguments(cfg: CfgNode) -> dict[str, Any]:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "collate_fn": trivial_batch_collator,
        # So that images are copied to a GPU while it computes
        "pin_memory": torch.device(cfg.MODEL.DEVICE).type == "cuda",
        # DataLoader draws a seed for its workers, which must not change the caller's generator
        "generator": torch.Generator().manual_seed(0),
    }
