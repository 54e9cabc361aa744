"""Hooks beside Detectron2's own."""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import IO, Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from fvcore.common.checkpoint import Checkpointer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from miti_detr.files import write_text

logger = logging.getLogger(__name__)

# The logger of CommonMetricPrinter, which writes the periodic lines.
_PERIODIC_LINES = "detectron2.utils.events"
_LOGGERS = ("detectron2", "fvcore", "miti_detr")

STEPS_FILE = "steps.json"
STEP_KEYS = ("total_loss", "grad_norm")


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's hook, whose memory of the best score survives a resume.

    The best weights are no place to resume from: ``checkpointer`` must neither hold the trainer nor
    mark what it saves as the last checkpoint.
    """

    def __init__(self, eval_period: int, checkpointer: Checkpointer, val_metric: str) -> None:
        """Take what Detectron2's hook takes; higher is better, the file is ``model_best.pth``."""
        super().__init__(eval_period, checkpointer, val_metric)

    def before_train(self) -> None:
        """Read the score of the best weights of the run that is resumed."""
        path = Path(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter > 0 and path.is_file():
            # mmap: only two numbers are read, not the tensors.
            best = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if best.get("metric") == self._val_metric:
                self.best_metric, self.best_iter = best["score"], best["iteration"]

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None:
            return
        score, iteration = latest
        best = self.best_metric
        if (best is None or self._compare(score, best)) and self._update_best(score, iteration):
            extra = {"metric": self._val_metric, "score": score, "iteration": iteration}
            self._checkpointer.save(self._file_prefix, **extra)
            self._logger.info(f"{self._file_prefix}.pth: {self._val_metric} {score:.3f}")


class ResidualRamp(HookBase):
    """Raises the strength of the layer residual linearly from 0 at the first training step to 1.

    Step 0 of a model with DETR's weights is then a step of that DETR. The strength is a function of
    the iteration, so that a resumed run goes on exactly; it is saved with the weights.
    """

    def __init__(self, iters: int) -> None:
        """Set the length of the ramp.

        Args:
            iters: iteration from which on the strength is 1; 0: it always is.
        """
        self.iters = iters

    def before_train(self) -> None:
        """Say what will happen.

        Raises:
            ValueError: the model has no strength to ramp.
        """
        model = self._model()
        if not hasattr(model, "residual_strength"):
            if self.iters > 0:
                raise ValueError(
                    f"MODEL.DETR.RESIDUAL_RAMP_ITERS is {self.iters}, but {type(model).__name__} "
                    "has no layer residual: set it to 0"
                )
            return
        start, end = self._strength(self.trainer.start_iter), self._strength(self.trainer.max_iter)
        if start < 1:
            logger.info(
                "the strength of the layer residual rises from %.4g to %.4g (1 from iteration %d "
                "on)",
                *(start, end, self.iters),
            )
        elif model.residual_strength < 1:
            logger.info(
                "the layer residual had strength %.4g in the weights, is now 1",
                model.residual_strength,
            )

    def before_step(self) -> None:
        """Set the strength of this iteration."""
        model = self._model()
        if hasattr(model, "residual_strength"):
            model.residual_strength = self._strength(self.trainer.iter)

    def _strength(self, iteration: int) -> float:
        return min(iteration / self.iters, 1.0) if self.iters > 0 else 1.0

    def _model(self) -> Any:
        return getattr(self.trainer.model, "module", self.trainer.model)


class RunWriters(hooks.PeriodicWriter):
    """Detectron2's ``PeriodicWriter``, which first drops records of steps that are done again.

    A run that stopped between two checkpoints has written metrics past the last checkpoint;
    resumed, it writes them again.
    """

    def __init__(self, output_dir: str, period: int = 20) -> None:
        """Open nothing yet.

        Args:
            output_dir: folder of ``metrics.json`` and of the TensorBoard files.
            period: iterations between two records.
        """
        super().__init__([], period)
        self._output_dir = output_dir

    def before_train(self) -> None:
        """Drop what will be written again, then open the files."""
        start = self.trainer.start_iter
        metrics = os.path.join(self._output_dir, "metrics.json")
        drop_records(metrics, start)
        self._writers: list[EventWriter] = [
            CommonMetricPrinter(self.trainer.max_iter),
            JSONWriter(metrics),
            TensorboardXWriter(self._output_dir, purge_step=start),
        ]


def read_records(path: str) -> list[dict[str, float]]:
    """Read ``metrics.json``; a line that a kill cut short is left out.

    Args:
        path: file of Detectron2's ``JSONWriter``; need not exist.
    """
    records = []
    if os.path.isfile(path):
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


def drop_records(path: str, start_iter: int) -> None:
    """Remove from ``metrics.json`` the records of iteration ``start_iter`` and later, atomically.

    Args:
        path: file of Detectron2's ``JSONWriter``; need not exist.
        start_iter: first iteration that is still to be done.
    """
    if os.path.isfile(path):
        kept = [r for r in read_records(path) if r["iteration"] < start_iter]
        write_text(path, "".join(json.dumps(r, sort_keys=True) + "\n" for r in kept))


class StepLog(HookBase):
    """Writes loss and gradient norm of every iteration to ``steps.json``, a line each.

    ``metrics.json`` holds medians of 20 iterations, which hide what a single step does.
    """

    def __init__(self, output_dir: str) -> None:
        """Open nothing yet.

        Args:
            output_dir: folder of the file.
        """
        self._path = os.path.join(output_dir, STEPS_FILE)
        self._file: IO[str] | None = None

    def before_train(self) -> None:
        """Drop what will be written again, then open the file."""
        drop_records(self._path, self.trainer.start_iter)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def after_step(self) -> None:
        """Add the line of this iteration."""
        assert self._file is not None
        histories = self.trainer.storage.histories()
        found = {key: histories[key].latest() for key in STEP_KEYS if key in histories}
        self._file.write(json.dumps({"iteration": self.trainer.iter, **found}) + "\n")
        self._file.flush()

    def after_train(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class ProgressBar(HookBase):
    """In a terminal, shows a bar with iteration, time left and loss instead of the periodic lines.

    The lines still go to ``log.txt``. Where the output is no terminal, this hook does nothing.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._redirect = contextlib.ExitStack()

    def before_train(self) -> None:
        """Show the bar, and let log lines pass above it."""
        if not sys.stdout.isatty():
            return
        loggers = [logging.getLogger(name) for name in _LOGGERS]
        self._redirect.enter_context(logging_redirect_tqdm(loggers))
        console = loggers[0].handlers[-1]  # of the redirection; goes away with it
        console.addFilter(lambda record: record.name != _PERIODIC_LINES)
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            unit="it",
            dynamic_ncols=True,
            file=sys.stdout,
        )

    def after_step(self) -> None:
        """Advance the bar."""
        if self._bar is not None:
            loss = self.trainer.storage.history("total_loss").latest()
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            self._bar.update()

    def after_train(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._redirect.close()
