"""One run per ``OUTPUT_DIR``."""

import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .heartbeat import this_process

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)


@contextmanager
def run_lock(folder: str, *, patience: float = 0.0) -> Iterator[None]:
    """Keep other runs out of a folder.

    The system releases the lock when this process ends, in whatever way. The file stays.

    Args:
        folder: ``OUTPUT_DIR`` of the run; must exist. Remote folders are not locked.
        patience: seconds to wait for another run to end.

    Raises:
        BlockingIOError: another run uses the folder; names it, its process and its machine.
    """
    if "://" in folder:
        yield
        return
    with Path(folder, LOCK_FILE).open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while not _acquire(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise BlockingIOError(
                    f"OUTPUT_DIR {folder} is in use by {file.read().strip() or 'another run'}. "
                    "Wait for that run to end, or choose another OUTPUT_DIR."
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{this_process()}\n")
        file.flush()
        yield


def _acquire(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        logger.warning("this file system has no locks (%s): start only one run in it", error)
    return True
