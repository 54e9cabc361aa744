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
        self._next = 0  # iteration of the next line

    def before_train(self) -> None:
        """Remove the lines that will be written again, then open the file."""
        self._next = first_record(self.trainer)
        drop_records(self._path, self._next)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def after_step(self) -> None:
        """Add the lines of the iterations whose values have come, on a GPU one step late."""
        assert self._file is not None
        found: dict[int, dict[str, float]] = {}
        for key in STEP_KEYS:
            history = self.trainer.storage.histories().get(key)
            for value, iteration in reversed(history.values() if history else ()):
                if iteration < self._next:
                    break
                found.setdefault(iteration, {}).setdefault(key, value)
        for iteration, values in sorted(found.items()):
            self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
            self._next = iteration + 1
        self._file.flush()

    def after_train(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
