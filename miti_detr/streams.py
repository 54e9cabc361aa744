"""Standard output and error that never end a program: closed, piped into ``head``, or ASCII."""

import io
import logging
import os
import sys


def prepare_streams() -> None:
    """Make printing safe, whatever standard output and standard error are connected to.

    A closed stream (``command >&-``) is replaced by one that discards what is written: libraries
    call ``sys.stdout.isatty()``. A character that the encoding of a stream lacks is written as
    ``?``. A log message that can no longer be written, because the reader of a pipe has gone,
    leaves no traceback.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != "replace":
            stream.reconfigure(errors="replace")
    logging.raiseExceptions = False


def discard_output() -> None:
    """Discard what is still buffered for a pipe whose reader has gone, also at interpreter exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(null, stream.fileno())
        except (OSError, ValueError):
            pass
    os.close(null)
