"""Checkpoints as backends of the predictor: Detectron2's ``Instances`` come out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager

from miti_detr.checkpoint import read_checkpoint
from miti_detr.checkpoint.files import TRUST_KEY
from miti_detr.checkpoint.variant import RECORD_KEY, THRESHOLD
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.evaluation import MitiDetrWithTTA, tta_config
from miti_detr.visualize.classes import ClassTable, class_table

from .backends import Item
from .detections import Found, Result
from .inputs import Source
from .predictor import DEFAULT_THRESHOLD

PRECISIONS = ("float32", "bfloat16", "float16")


class NamedInstances(Result, Instances):
    """Detectron2's ``Instances`` that know the names of their classes and their image.

    Fields are ``pred_boxes``, ``scores`` (in descending order), ``pred_classes``, and
    ``pred_masks`` of a model with masks, on the CPU.
    """

    def found(self) -> Found:
        """The bare detections as arrays."""
        fields = [self.pred_boxes.tensor, self.scores, self.pred_classes]
        fields += [self.pred_masks] if self.has("pred_masks") else []
        return Found(*(field.detach().cpu().numpy() for field in fields))

    def to(self, *args: Any, **kwargs: Any) -> "NamedInstances":
        """As that of ``Instances``."""
        return self._like(super().to(*args, **kwargs))

    def __getitem__(self, item: Any) -> "NamedInstances":
        return self._like(super().__getitem__(item))

    def _like(self, instances: Instances) -> "NamedInstances":
        return name_instances(instances, self._classes, self._source)


def name_instances(
    instances: Instances, classes: ClassTable, source: Source | None
) -> NamedInstances:
    """Add the names of the classes and the image to ``Instances``."""
    named = NamedInstances(instances.image_size, **instances.get_fields())
    named._classes, named._source = classes, source
    return named


class CheckpointBackend:
    """A model of a checkpoint, by torch and Detectron2."""

    def __init__(self, cfg: CfgNode, threshold: float | None = None) -> None:
        """Build the model of a frozen config and load its weights.

        Args:
            cfg: of :func:`checkpoint_config`.
            threshold: lowest score of a detection that has a mask; None: as recorded.
        """
        if cfg.TEST.AUG.ENABLED:
            cfg = tta_config(cfg)
        self._predictor = Predictor(cfg)
        if cfg.TEST.AUG.ENABLED:
            self._predictor.model = MitiDetrWithTTA(cfg, self._predictor.model)
        record = checkpoint_record(cfg)
        device = torch.device(cfg.MODEL.DEVICE)
        self.input_format = self._predictor.input_format
        self.orientation = self._predictor.orientation
        self.precision = cfg.SOLVER.AMP.PRECISION if cfg.TEST.AMP.ENABLED else "float32"
        self.provider = f"torch {device}"
        self.classes = classes_of(cfg, record)
        self.threshold: float | None = record.get(THRESHOLD)
        self.with_masks = bool(cfg.MODEL.MASK_ON)
        if self.with_masks:  # which take time
            known = (x for x in (threshold, self.threshold) if x is not None)
            model: Any = self._predictor.model
            model.min_score = next(known, DEFAULT_THRESHOLD)

    def prepare(self, image: np.ndarray) -> Item:
        """Resize an image (H, W, 3) uint8 as in evaluation."""
        return self._predictor.prepare(image)

    def detect(self, items: Sequence[Item]) -> list[Found]:
        """Detect in a batch; all detections, boxes in pixels of the images as given."""
        with torch.no_grad():
            outputs = self._predictor.model(list(items))
        found = []
        for output in outputs:
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.numpy()
            scores, classes = instances.scores.numpy(), instances.pred_classes.numpy()
            found.append(Found(boxes, scores, classes, more=instances))
        return found

    def result(self, found: Found, size: tuple[int, int], source: Source | None) -> Result:
        """Make what the user gets."""
        if found.more is not None:
            return name_instances(found.more, self.classes, source)
        boxes, scores, classes = (torch.from_numpy(array) for array in found[:3])
        joined = Instances(size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
        return name_instances(joined, self.classes, source)


def checkpoint_config(
    weights: str,
    *,
    device: str | None,
    precision: str | None,
    tta: bool,
    config_file: str | None,
    overrides: Sequence[str],
) -> CfgNode:
    """Read the config of a checkpoint for prediction.

    Args:
        weights: the checkpoint.
        device: ``cpu``, ``cuda``, ``cuda:1``; None: as the config says, or the CPU if there is no
            GPU.
        precision: one of :data:`PRECISIONS`; None: as the config says.
        tta: with test-time augmentation.
        config_file: None takes the config in the checkpoint.
        overrides: alternating keys and values.

    Raises:
        ValueError: the precision is unknown, there is no such device, or as
            :func:`~miti_detr.engine.predictor.load_config`.
    """
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision is {precision!r}. Use {', '.join(PRECISIONS)}.")
    words = [*overrides]
    if device is not None:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"there is no CUDA device for device {device!r}. Use cpu.")
        words += ["MODEL.DEVICE", device]
    if tta:
        words += ["TEST.AUG.ENABLED", "True"]
    if precision == "float32":
        words += ["TEST.AMP.ENABLED", "False"]
    elif precision is not None:
        words += ["TEST.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", precision]
    cfg = load_config(config_file, weights=weights, overrides=words).clone()
    cfg.defrost()
    cfg.TEST.MASK_FORMAT = "bool"
    cfg.freeze()
    return cfg


def checkpoint_record(cfg: CfgNode) -> dict[str, Any]:
    """What the checkpoint says about its weights; empty for weights of others, and without any."""
    if not cfg.MODEL.WEIGHTS:
        return {}
    path = PathManager.get_local_path(cfg.MODEL.WEIGHTS)
    trust = getattr(cfg.MODEL, TRUST_KEY.rpartition(".")[2])
    record = read_checkpoint(path, trust=trust).get(RECORD_KEY)
    return dict(record) if isinstance(record, dict) else {}


def classes_of(cfg: CfgNode, record: dict[str, Any]) -> ClassTable:
    """Names and ids of the classes: recorded with the weights, or of the data of the config."""
    count = cfg.MODEL.DETR.NUM_CLASSES
    names = record.get("class_names") or []
    tables = [class_table(name, count) for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)]
    plain = class_table(None, count)
    known = next((table for table in tables if table != plain), plain)
    if len(names) != count or list(names) == known.names:
        return known
    return ClassTable([str(name) for name in names], plain.dataset_ids)
