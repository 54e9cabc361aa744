"""What is made of tensors, kept until one of these changes."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Derived(Generic[T]):
    """Something made of tensors, made again when one of them has changed.

    Copies and pickles of it are empty: it can be made again there.
    """

    def __init__(self) -> None:
        """Make an empty one."""
        self._kept: tuple[object, T] | None = None

    def get(self, make: Callable[[], T], sources: Sequence[Tensor | None], *others: object) -> T:
        """What ``make`` gives, without gradient, or gave for the same arguments.

        Args:
            make: called without arguments.
            sources: the tensors that it uses.
            others: what else it depends on.
        """
        tensors = [t for t in sources if t is not None]
        if any(t.is_inference() for t in tensors):  # they do not tell when they change
            with torch.no_grad():
                return make()
        key = (*others, *((t.data_ptr(), t._version) for t in tensors))
        kept = self._kept  # another thread may exchange it meanwhile
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = key, make()
        return kept[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Derived[T]":
        """An empty one."""
        return Derived()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """An empty one."""
        return Derived, ()
