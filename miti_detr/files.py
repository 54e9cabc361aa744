"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
