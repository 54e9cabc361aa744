"""``metrics.json``, TensorBoard files and the log of a run that may be resumed."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.engine import hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from miti_detr.files import write_text

WRITE_PERIOD = 20  # iterations between two records


class RunWriters(hooks.PeriodicWriter):
    """Detectron2's ``PeriodicWriter``, which first removes records that are written again.

    A run that stops between two checkpoints has written metrics of later iterations than that of
    its last checkpoint. A resumed run repeats these iterations.
    """

    def __init__(
        self,
        output_dir: str,
        period: int = WRITE_PERIOD,
        *,
        others: Sequence[Callable[[], EventWriter]] = (),
    ) -> None:
        """Take the folder; the files are opened when training begins.

        Args:
            output_dir: folder of ``metrics.json`` and of the TensorBoard files.
            period: iterations between two records.
            others: make further writers.
        """
        super().__init__([], period)
        self._output_dir = output_dir
        self._others = others

    def before_train(self) -> None:
        """Remove the records that will be written again, then open the files."""
        start = first_record(self.trainer)
        if start < self.trainer.start_iter:  # the storage holds all since the last regular record
            start -= start % self._period
        metrics = os.path.join(self._output_dir, "metrics.json")
        drop_records(metrics, start)
        json_writer = JSONWriter(metrics)
        tensorboard = TensorboardXWriter(self._output_dir, purge_step=start)
        others = [make() for make in self._others]
        for writer in (json_writer, tensorboard, *others):
            if hasattr(writer, "_last_write"):
                writer._last_write = start - 1  # Detectron2 has no public way to say so
        printer = CommonMetricPrinter(self.trainer.max_iter)
        self._writers: list[EventWriter] = [printer, json_writer, tensorboard, *others]


def first_record(trainer: Any) -> int:
    """Return the first iteration that a resumed trainer records again.

    Our trainer repeats what belongs to the last iteration of its checkpoint but happens after it;
    others continue at ``start_iter``.
    """
    return getattr(trainer, "first_record", trainer.start_iter)


def read_records(path: str) -> list[dict[str, Any]]:
    """Read ``metrics.json`` or a file like it.

    Lines that are not records are left out: a kill may have cut the last one.

    Args:
        path: file of Detectron2's ``JSONWriter``; need not exist.
    """
    records = []
    if os.path.isfile(path):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("iteration"), int):
                    records.append(record)
    return records


def drop_records(path: str, start_iter: int) -> None:
    """Remove the records of iteration ``start_iter`` and later from a file, atomically.

    Args:
        path: as for :func:`read_records`.
        start_iter: first iteration that will be recorded again.
    """
    if os.path.isfile(path):
        kept = [r for r in read_records(path) if r["iteration"] < start_iter]
        write_text(path, "".join(json.dumps(r, sort_keys=True) + "\n" for r in kept))
