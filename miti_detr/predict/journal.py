"""What a job has done so far, on disk, so that it can be killed at any time and continued."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Entry = dict[str, Any]


class Journal:
    """Lines of JSON: the settings of the job, then one entry for each file.

    An entry has ``file``, and ``error`` if the file could not be used. A later entry of a file
    replaces earlier ones. A line that was cut off by a kill is dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Continue the journal of a job, or begin one.

        Args:
            path: of the journal; its folder exists.
            settings: of the job, as plain values.

        Raises:
            BlockingIOError: another process writes it.
            ValueError: it was made with other settings, which are named.
        """
        self.path = path
        self._file = path.open("a+b")
        try:
            _lock(self._file.fileno(), path)
            self._places: dict[str, int] = {}
            self._failed: set[str] = set()
            self._read(json.loads(json.dumps(dict(settings))))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, file: str) -> bool:
        """Whether a file is done; one that failed is tried again."""
        return file in self._places and file not in self._failed

    def add(self, entries: Iterable[Entry]) -> None:
        """Write entries, which survive a kill of this process from then on."""
        position = self._file.seek(0, os.SEEK_END)
        lines = []
        for entry in entries:
            lines.append(json.dumps(entry, separators=(",", ":")).encode() + b"\n")
            self._note(entry, position)
            position += len(lines[-1])
        self._file.write(b"".join(lines))
        self._file.flush()

    def entry(self, file: str) -> Entry:
        """Read the entry of a file."""
        self._file.seek(self._places[file])
        entry: Entry = json.loads(self._file.readline())
        return entry

    def remove(self) -> None:
        """Delete the file, at the end of the job."""
        self.path.unlink()

    def _read(self, settings: Entry) -> None:
        self._file.seek(0)
        position = 0
        for number, line in enumerate(self._file):
            entry = _parse(line)
            if entry is None:  # cut off: whatever follows is unknown
                break
            if number == 0:
                self._compare(entry, settings)
            else:
                self._note(entry, position)
            position += len(line)
        self._file.truncate(position)
        if position == 0:
            self._file.write(json.dumps(settings).encode() + b"\n")
            self._file.flush()

    def _compare(self, made_with: Entry, settings: Entry) -> None:
        different = [key for key in settings if made_with.get(key) != settings[key]]
        if different:
            key = different[0]
            raise ValueError(
                f"{self.path} belongs to an unfinished job with {key} {made_with.get(key)}, not "
                f"{settings[key]}. Finish that job with its settings, delete the file, or choose "
                "another output folder."
            )

    def _note(self, entry: Entry, position: int) -> None:
        self._places[entry["file"]] = position
        (self._failed.add if "error" in entry else self._failed.discard)(entry["file"])


def _parse(line: bytes) -> Entry | None:
    if not line.endswith(b"\n"):
        return None
    with contextlib.suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return entry
    return None


def _lock(descriptor: int, path: Path) -> None:
    """The system releases the lock when this process ends, in whatever way."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"another process predicts into {path.parent}. Wait for it, or choose another folder."
        ) from error
    except OSError:
        return  # a file system without locks
