"""Ids of images, categories and annotations: matched as people mean them, numbered as tools need.

Exporters write ids as texts, as floats, from 0 or as null. pycocotools takes annotation 0 for "no
match", and faster-coco-eval takes integers only.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_LARGEST = 2**53  # integers up to here are exact in the float64 arrays of pycocotools
_INTEGER = re.compile(r"[+-]?[0-9]{1,30}(\.0*)?")


class IdTable:
    """Looks up the entries of a list by their ids.

    An id matches exactly, or else as a number: ``"7"``, ``7.0`` and ``7`` are the same where only
    one of them occurs in the table.

    Attributes:
        ids: the ids as given, without those that cannot be referenced.
        numbers: integers for the entries: the ids themselves if all are integers that every tool
            takes, otherwise 1..n.
        renumbered: entries whose ids could not be kept.
    """

    def __init__(self, ids: Sequence[Any]) -> None:
        """Index the ids.

        Args:
            ids: texts, numbers or null, each once.

        Raises:
            ValueError: an id is of another type, or occurs twice.
        """
        self.ids = list(ids)
        for value in self.ids:
            if not is_id(value):
                raise ValueError(f"the id {value!r:.50} is neither a number nor a text")
        self._exact = {_exact(value): i for i, value in enumerate(self.ids)}
        if len(self._exact) < len(self.ids):
            twice = next(v for i, v in enumerate(self.ids) if self._exact[_exact(v)] != i)
            raise ValueError(f"several entries have the id {twice!r:.50}")
        self.renumbered = sum(not _is_usable(value, least=0) for value in self.ids)
        self.numbers = list(range(1, len(self.ids) + 1)) if self.renumbered else self.ids
        self._integers = set(map(type, self.ids)) <= {int}
        self._canonical: dict[Any, int] = {}
        for value, index in zip(self.ids, range(len(self.ids)), strict=True):
            key = canonical(value)
            self._canonical[key] = -1 if key in self._canonical else index

    def find(self, values: Sequence[Any]) -> tuple[np.ndarray, int]:
        """Look up references.

        Args:
            values: whatever the file holds.

        Returns:
            (A) int64 indices, -1 for those that are not in the table; and how many were found
            although they are written differently.
        """
        if self._integers and set(map(type, values)) <= {int}:
            return np.array([self._exact.get(v, -1) for v in values], dtype=np.int64), 0
        found = np.full(len(values), -1, dtype=np.int64)
        repaired = 0
        for i, value in enumerate(values):
            if not is_id(value):
                continue
            found[i] = self._exact.get(_exact(value), -1)
            if found[i] < 0:
                found[i] = self._canonical.get(canonical(value), -1)
            repaired += found[i] >= 0 and type(value) is not int
        return found, int(repaired)


def number_annotations(ids: Sequence[Any]) -> tuple[list[int], int]:
    """Integers for annotations: their ids if all are positive and unique, otherwise 1..A.

    Args:
        ids: whatever the file holds.

    Returns:
        The numbers, and how many ids could not be kept.
    """
    usable = [value for value in ids if _is_usable(value, least=1)]
    bad = len(ids) - len(set(usable))
    return (list(range(1, len(ids) + 1)) if bad else usable), bad


def is_id(value: Any) -> bool:
    """Whether a JSON value can name an entry: a text, a finite number, true, false or null."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, int | str)


def canonical(value: Any) -> Any:
    """The key under which differently written ids are the same."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, str):
        text = value.strip()
        if _INTEGER.fullmatch(text):
            return int(text.partition(".")[0])
        return text
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _exact(value: Any) -> Any:
    return ("bool", value) if isinstance(value, bool) else value


def _is_usable(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _LARGEST
