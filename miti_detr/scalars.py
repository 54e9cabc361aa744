"""Scalars for the log that stay on the device until all of a step are copied together.

``EventStorage.put_scalar`` of a tensor on a GPU waits for the device. A training step has two dozen
scalars from several places, and one wait is enough.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

Collected = dict[str, list[Tensor]]

_collections: list[Collected] = []


@contextlib.contextmanager
def collected_scalars() -> Iterator[Collected]:
    """While entered, :func:`log_scalars` adds to the yielded dict instead of the event storage."""
    _collections.append({})
    try:
        yield _collections[-1]
    finally:
        _collections.pop()


def is_logging() -> bool:
    """Whether :func:`log_scalars` has somewhere to put scalars."""
    return bool(_collections) or has_event_storage()


def log_scalars(scalars: Mapping[str, Tensor]) -> None:
    """Log scalars under their names; without :func:`collected_scalars` at once, by one copy.

    Args:
        scalars: tensors of one element, on one device.
    """
    if _collections:
        for name, value in scalars.items():
            _collections[-1].setdefault(name, []).append(value.detach())
    elif has_event_storage():
        values = stack_scalars(list(scalars.values())).tolist()
        for name, value in zip(scalars, values, strict=True):
            get_event_storage().put_scalar(name, value)


def stack_scalars(scalars: list[Tensor]) -> Tensor:
    """Stack scalars of any floating-point types to one vector, float32 or better."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in scalars) else torch.float32
    return torch.stack([x.detach().reshape(()).to(dtype) for x in scalars])


class HostCopy:
    """A tensor on its way to the host, which does not wait for it before it is read."""

    def __init__(self, tensor: Tensor) -> None:
        """Start the copy of a tensor that will not change."""
        self._copy = tensor.to("cpu", non_blocking=True)  # of a GPU's: to pinned memory
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        """Wait for the copy, and return its values."""
        if self._event is not None:
            self._event.synchronize()
        values: list[Any] = self._copy.tolist()
        return values
