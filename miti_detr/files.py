"""Files that appear whole or not at all."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"  # suffix of files that are being written


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what is written there takes its place at the end.

    Args:
        path: final file; its folder is made. An old file stays until the new one is complete.

    Yields:
        The name to write to, with the same extension. After an exception it is removed and
        ``path`` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all.

    Args:
        path: final file; its folder is made.
        text: the content, written as UTF-8.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing that takes its place, on the disk too, only when it is complete.

    Args:
        path: final local file; its folder is made. An old file stays until then.

    Yields:
        The open file. Its name has the process id and ends in ``.incomplete``; a kill can leave it
        behind, and nothing picks it up.
    """
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.{os.getpid()}{INCOMPLETE}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)  # else a power failure may undo the renaming
    finally:
        os.close(directory)


def remove_incomplete(folder: str) -> None:
    """Remove what killed processes of this machine left of :func:`atomic_write` in a folder."""
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        process = name.removesuffix(INCOMPLETE).rpartition(".")[2]
        if name.endswith(INCOMPLETE) and not (process.isdigit() and _is_running(int(process))):
            logger.warning("removing %s, left by a process that was stopped", name)
            os.remove(os.path.join(folder, name))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # of somebody else
        return True
    return process != os.getpid()  # this process writes one file at a time
