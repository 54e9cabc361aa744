"""A progress bar for terminals."""

import contextlib
import logging
import sys

from detectron2.engine import HookBase
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

# The logger of CommonMetricPrinter, which writes the periodic lines.
_PERIODIC_LINES = "detectron2.utils.events"
_LOGGERS = ("detectron2", "fvcore", "miti_detr")


class ProgressBar(HookBase):
    """Shows a bar with iteration, remaining time and loss instead of the periodic log lines.

    The lines still go to ``log.txt``. If the output is not a terminal, this hook does nothing.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._redirect = contextlib.ExitStack()

    def before_train(self) -> None:
        """Show the bar, and print log lines above it."""
        if sys.stdout is None or not sys.stdout.isatty():  # None: it is closed
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
            latest = self.trainer.storage.latest().get("total_loss")
            if latest is not None:  # on a GPU, that of the step before
                self._bar.set_postfix_str(f"loss {latest[0]:.4g}", refresh=False)
            self._bar.update()

    def after_train(self) -> None:
        """Close the bar; its last state stays on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._redirect.close()
