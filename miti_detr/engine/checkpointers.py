"""The checkpoints of a run: averaged weights, where the run has such, and the best ones."""

import contextlib
from typing import Any

from torch import nn

from miti_detr.checkpoint import MitiDetrCheckpointer

from .solver.ema import WeightAverage


class RunCheckpointer(MitiDetrCheckpointer):
    """Saves under ``model`` the weights that evaluation uses.

    With ``SOLVER.EMA`` these are the averaged ones, and the record of the checkpoint says so. The
    weights that are trained are then in the state of the trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        average: WeightAverage | None = None,
        **arguments: Any,
    ) -> None:
        """Take the arguments of :class:`MitiDetrCheckpointer`, and the average of the weights."""
        super().__init__(model, save_dir, **arguments)
        self._average = average

    def save(self, name: str, **kwargs: Any) -> None:
        """See :meth:`MitiDetrCheckpointer.save`."""
        with contextlib.nullcontext() if self._average is None else self._average.in_model():
            super().save(name, **kwargs)


class BestWeights(RunCheckpointer):
    """Saves weights that no run resumes from."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Do not change which checkpoint is the last one."""
