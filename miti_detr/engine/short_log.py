"""A screen that shows what a person reads during a training; ``log.txt`` keeps everything."""

import logging
import re
import sys

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

_MOST_LINES = 20  # of a message; tables of results have fewer, environment, config and model more
# What repeats a table, or tells how records are stored; "d2" is how the screen abbreviates it.
_REPEATING = re.compile(r"(d2|detectron2)\.(data\.common|evaluation\.(testing|coco_evaluation))")
# Single losses and repeated times; the total loss stays.
_DETAILS = re.compile(r"\s(?!total_loss)(?:\w*loss\w*|last_\w+|data_time): \S+\s")


def shorten_screen_log(output_dir: str) -> None:
    """Leave details out of what Detectron2's loggers and that of this package show on the screen.

    Args:
        output_dir: folder of ``log.txt``.
    """
    rank = comm.get_rank()
    for logger in (
        setup_logger(output_dir, distributed_rank=rank, name="fvcore"),
        setup_logger(output_dir, distributed_rank=rank),
        setup_logger(output_dir, distributed_rank=rank, name="miti_detr"),
    ):
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stdout and handler.formatter:
                handler.setFormatter(_Short(handler.formatter))
                handler.addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    repeats = _REPEATING.fullmatch(record.name) or str(record.msg).endswith("in csv format:")
    return record.levelno > logging.INFO or not repeats


class _Short(logging.Formatter):
    """Text of another formatter, of long messages the first line, of losses the total."""

    def __init__(self, long: logging.Formatter) -> None:
        super().__init__()
        self._long = long

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        text = self._long.format(record)
        if record.name.endswith(".utils.events"):
            return _DETAILS.sub("", text)
        first, *others = text.splitlines() or [""]
        return f"{first} ... (log.txt)" if len(others) >= _MOST_LINES else text
