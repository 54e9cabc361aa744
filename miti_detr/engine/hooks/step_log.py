"""Records loss and gradient norm of every iteration."""

import json
import os
from typing import IO

from detectron2.engine import HookBase

from .writers import drop_records, first_record

STEPS_FILE = "steps.json"
STEP_KEYS = ("total_loss", "grad_norm")


class StepLog(HookBase):
    """Writes loss and gradient norm of every iteration to ``steps.json``, a line each.

    ``metrics.json`` holds medians of 20 iterations, which hide what a single step does.
    """

    def __init__(self, output_dir: str) -> None:
        """Take the folder; the file is opened when training begins.

        Args:
            output_dir: folder of the file.
        """
        self._path = os.path.join(output_dir, STEPS_FILE)
        self._file: IO[str] | None = None

    def before_train(self) -> None:
        """Remove the lines that will be written again, then open the file."""
        drop_records(self._path, first_record(self.trainer))
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
