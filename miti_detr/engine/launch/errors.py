"""Which errors are the user's, and how they are reported in one line."""

import errno
import logging
import re

import torch
from torch import distributed

from miti_detr.engine.hooks import NonFiniteError

_USER_ERRORS = (ValueError, OSError, ImportError, NonFiniteError)
_WORKER_ERROR = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.")
_USER_ERROR_NAMES = re.compile(r"\w*(ValueError|OSError|IOError|KeyError|FileNotFoundError)$")
_LAST_LINES = re.compile(r"^(?!Traceback|Caught|Original)[\w.]+: (?P<text>.*)", re.M | re.S)


class PeerError(RuntimeError):
    """Another process of the run has failed or does not answer."""


def user_message(error: BaseException) -> str | None:
    """Describe an error that the user can do something about.

    Args:
        error: that ended a run.

    Returns:
        A message without a traceback. None for errors of the program, whose traceback is needed.
    """
    if isinstance(error, NonFiniteError):
        return str(error)
    if full := _disk_full(error):
        return f"the disk is full ({_text(full)}). Free some space, then resume the run."
    text = _text(error)
    if worker := _WORKER_ERROR.match(text):
        known = _USER_ERROR_NAMES.match(worker[1]) is not None
        text = _raised_in_worker(text)
    elif isinstance(error, KeyError):  # that of a dictionary only has the key
        known = " " in text.strip()
    else:
        known = isinstance(error, _USER_ERRORS)
    if isinstance(error, torch.OutOfMemoryError):
        known = True
        text += " Lower SOLVER.IMS_PER_BATCH or INPUT.MAX_SIZE_TRAIN."
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid"):
        known = True
        text += " If memory is short, lower DATALOADER.NUM_WORKERS."
    if isinstance(error, PeerError) or is_peer_failure(error):
        known = True
        text = f"another process of the run has failed or does not answer ({text})"
    return " ".join(text.split()) if known else None


def is_peer_failure(error: BaseException) -> bool:
    """Say whether an error is only the consequence of another process' failure."""
    if isinstance(error, PeerError | distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search(r"\b(gloo|NCCL)\b", str(error)) is not None


def log_errors_in_one_line() -> None:
    """Let Detectron2's trainer log an error of the user without a traceback."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    message = user_message(error) if error is not None else None
    if message is not None:
        record.msg, record.args, record.exc_info = "training stopped: %s", (message,), None
    return True


def _disk_full(error: BaseException | None) -> OSError | None:
    """Find the error of a full disk; ``torch.save`` raises another one after it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return error
        error = error.__cause__ or error.__context__
    return None


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:  # str(KeyError) is the repr of its message
        return str(error.args[0])
    return str(error) or type(error).__name__


def _raised_in_worker(text: str) -> str:
    """The message of an error whose text is the traceback of a data-loader worker."""
    found = _LAST_LINES.search(text)
    return found["text"] if found else text
