"""Images and films on a command line: files, folders, patterns, standard input."""

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from miti_detr.pictures import IMAGE_SUFFIXES

FILM_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


def find_images(paths: Sequence[str | Path], *, films: bool = False) -> list[Path]:
    """List image files, each once, in the given order.

    Args:
        paths: files; folders, of which the images directly inside are taken, sorted by name;
            patterns such as ``photos/**/*.jpg``; or ``-`` for a list on standard input, one path a
            line. A file is listed whatever its name, even if it is missing; the error then comes
            when it is read.
        films: take films from folders, too.

    Raises:
        ValueError: there are no images.
    """
    suffixes = IMAGE_SUFFIXES + FILM_SUFFIXES if films else IMAGE_SUFFIXES
    found: dict[Path, None] = {}
    for path in map(str, paths):
        found.update(dict.fromkeys(_expand(path, suffixes)))
    if not found:
        names = ", ".join(map(str, paths))
        raise ValueError(
            f"no images in {names}. Sub-folders are searched by patterns, such as "
            f"'{paths[0]}/**/*.jpg'"
        )
    return list(found)


def _expand(path: str, suffixes: tuple[str, ...]) -> Iterable[Path]:
    if path == "-":
        return (Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip())
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            names = sorted(e.name for e in entries if e.name.lower().endswith(suffixes))
        return (Path(path) / name for name in names)
    if any(sign in path for sign in "*?[") and not os.path.exists(path):
        return map(Path, sorted(glob.glob(path, recursive=True)))
    return (Path(path),)


def is_film(path: Path) -> bool:
    """Whether the name of a file is that of a film."""
    return path.suffix.lower() in FILM_SUFFIXES
