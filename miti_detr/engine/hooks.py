"""Hooks beside Detectron2's own."""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path

import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from fvcore.common.checkpoint import Checkpointer
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from miti_detr.files import write_text

# The logger of CommonMetricPrinter, which writes the periodic lines.
_PERIODIC_LINES = "detectron2.utils.events"
_LOGGERS = ("detectron2", "fvcore", "miti_detr")


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
