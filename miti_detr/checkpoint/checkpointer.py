"""Detectron2's checkpointer, for weights from anywhere."""

import glob
import logging
import os
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn

from miti_detr.files import atomic_write, remove_incomplete
from miti_detr.pixels import Pixels, expected_pixels, warn_if_pixels_differ

from .attach import accept_weights
from .convert import ConversionReport, recognise
from .errors import CheckpointError
from .files import read_checkpoint, weights_file
from .fit import check_finite, prepare_weights
from .sources import BACKBONE_SOURCES
from .variant import (
    RECORD_KEY,
    Purpose,
    class_names,
    make_record,
    recorded_variant,
    restore_strength,
    variant_of,
)

logger = logging.getLogger(__name__)


class MitiDetrCheckpointer(DetectionCheckpointer):
    """A ``DetectionCheckpointer`` that converts, checks, and writes whole files.

    ``load`` takes any file that :func:`read_checkpoint` reads and :func:`convert_state_dict`
    knows, and says in one line what it was. Weights of another variant are refused for evaluation
    and announced as a warm start for training. Each checkpoint records the variant and the config.

    A model that is not ours (it has no attribute ``variant``) is loaded as Detectron2 does it.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        cfg: CfgNode | None = None,
        for_training: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        """Take the model and what is saved beside it.

        Args:
            model: may be wrapped in ``DistributedDataParallel``.
            save_dir: folder of the checkpoints.
            save_to_disk: None: in the main process only.
            cfg: recorded in the checkpoints; ``MODEL.DETR.WEIGHTS_RESIDUAL`` and
                ``MODEL.TRUST_WEIGHTS`` are read from it.
            for_training: True: weights of another variant are a warm start, with a warning. False:
                they are refused. None: a warm start if there are checkpointables, such as a
                trainer. :meth:`resume_or_load` refuses them when it resumes.
            checkpointables: objects with ``state_dict`` and ``load_state_dict``.
        """
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.cfg = cfg
        self.for_training = for_training
        self._resuming = False
        self._path = ""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` and then the tag of the last checkpoint, each whole or not at all.

        Args:
            name: of the file, without extension.
            kwargs: further data to save.
        """
        variant = variant_of(self.model)
        if variant is not None:
            names = [] if self.cfg is None else class_names(self.cfg)
            if names:
                variant["class_names"] = names
            kwargs.setdefault(RECORD_KEY, make_record(variant, self.cfg))
        if "://" in self.save_dir:  # remote folders have their own way
            super().save(name, **kwargs)
            return
        if not self.save_dir or not self.save_to_disk:
            return
        remove_incomplete(self.save_dir)
        state = {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        if not os.path.exists(os.path.join(self.save_dir, "last_checkpoint")):
            # A kill between the two files must not leave a checkpoint without a tag.
            self.tag_last_checkpoint(os.path.basename(path))
        with atomic_write(path) as file:
            torch.save({"model": self.model.state_dict(), **state, **kwargs}, file)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write which checkpoint is the last one.

        Args:
            last_filename_basename: its file name in the folder.
        """
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def has_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from; a tag without a file is none."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Find the last checkpoint.

        Returns:
            The tagged file; if it is not there, the newest ``model_<iteration>.pth`` or
            ``model_final.pth``; "" if there is none.
        """
        if "://" in self.save_dir:
            return super().get_checkpoint_file() if super().has_checkpoint() else ""
        tag = os.path.join(self.save_dir, "last_checkpoint")
        if not self.save_dir or not os.path.isfile(tag):
            return ""
        path = super().get_checkpoint_file()
        if os.path.isfile(path):
            return path
        folder = glob.escape(self.save_dir)
        models = [  # and not model_best.pth, which has no state of the trainer
            *glob.glob(os.path.join(folder, "model_[0-9]*.pth")),
            *glob.glob(os.path.join(folder, "model_final.pth")),
        ]
        newest = max(models, key=os.path.getmtime, default="")
        logger.warning(
            "%s names no file that exists; %s", tag, f"taking {newest}" if newest else "ignored"
        )
        return newest

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights, and with them what else the checkpointer tracks.

        Args:
            path: file, folder of a Hugging Face model, or URL; empty: nothing is loaded.
            args: as in Detectron2.
            kwargs: as in Detectron2.

        Returns:
            What is in the checkpoint and was not used.

        Raises:
            CheckpointError: names the file, what is wrong with it, and what to do.
        """
        self._path = path
        if path and "://" not in path and variant_of(self.model) is not None:
            url = urlparse(path)
            path = url._replace(path=weights_file(url.path)).geturl()
        try:
            return super().load(path, *args, **kwargs)
        finally:
            self._parsed_url_during_load = None  # which Detectron2 leaves, and then cannot load

    def _load_file(self, filename: str) -> dict[str, Any]:
        if variant_of(self.model) is None or not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)
        # Detectron2 unpickles these with everything allowed.
        checkpoint = self._torch_load(filename)
        if filename.endswith(".pyth"):
            checkpoint.update(__author__="pycls", matching_heuristics=True)
        return checkpoint

    def _torch_load(self, f: str) -> dict[str, Any]:
        if variant_of(self.model) is None:
            return super()._torch_load(f)
        return read_checkpoint(f, trust=self.cfg is not None and self.cfg.MODEL.TRUST_WEIGHTS)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        variant = variant_of(self.model)
        if variant is None:
            return super()._load_model(checkpoint)
        state = checkpoint["model"]
        self._check_pixels(recognise(state), checkpoint.get("__author__", ""))
        if checkpoint.get("matching_heuristics") and recognise(state) is None:
            logger.info("%s: no format of ours; matched by Detectron2's heuristics", self._path)
            return super()._load_model(checkpoint)
        purpose = self._purpose()
        record = checkpoint.pop(RECORD_KEY, None)
        if record is None:
            record = recorded_variant(state)
        if self.cfg is not None and (names := class_names(self.cfg)):
            variant = {**variant, "class_names": names}
        try:
            checkpoint["model"], report, lines, different = prepare_weights(
                state,
                self.model.state_dict(),
                variant,
                record=record,
                stated="" if self.cfg is None else self.cfg.MODEL.DETR.WEIGHTS_RESIDUAL,
                purpose=purpose,
            )
            check_finite(checkpoint["model"])
        except CheckpointError as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        for line in lines:
            logger.info("%s: %s", self._path, line)
        if different:
            logger.warning("%s: a warm start: %s", self._path, different)
        checkpoint.pop("matching_heuristics", None)
        incompatible = super()._load_model(checkpoint)
        accept_weights(self.model)  # checked above
        if message := restore_strength(self.model, record):
            logger.info("%s: %s", self._path, message)
        if purpose != "evaluate":  # an evaluation with random parts deserves Detectron2's warning
            incompatible.missing_keys[:] = _unexplained(incompatible.missing_keys, report)
        return incompatible

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint of the folder, or load ``path`` for a new run.

        Args:
            path: as for :meth:`load`.
            resume: resume if there is a checkpoint. Weights of another variant are then refused.
        """
        self._resuming = resume and self.has_checkpoint()
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming = False

    def _purpose(self) -> Purpose:
        if self._resuming:
            return "resume"
        for_training = self.for_training
        if for_training is None:
            for_training = bool(self.checkpointables)
        return "warm_start" if for_training else "evaluate"

    def _check_pixels(self, source: str | None, author: str) -> None:
        mean, std = (getattr(self.model, f"pixel_{name}", None) for name in ("mean", "std"))
        if mean is None or std is None:
            return
        channels = "" if self.cfg is None else self.cfg.INPUT.FORMAT
        expected = expected_pixels(self._path, source=source, author=author)
        used = Pixels(mean.flatten().tolist(), std.flatten().tolist(), channels)
        warn_if_pixels_differ(self._path, expected, used)


def _unexplained(missing: list[str], report: ConversionReport) -> list[str]:
    """Leave out the missing keys that the report has named, or its kind of weights implies."""
    part = "backbone." if report.source in BACKBONE_SOURCES else ""
    return [key for key in missing if key.startswith(part) and key not in report.reinitialised]
