"""``metrics.json``, TensorBoard files and the log of a run that may be resumed."""

import contextlib
import json
import os
from pathlib import Path

from detectron2.engine import hooks
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter

from miti_detr.files import write_text


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
