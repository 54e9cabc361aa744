"""The next batch on its way to the device while a step runs."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from miti_detr.engine.parallel import Batch


class Prefetcher:
    """Iterates over batches, and fetches the next one when it is told to.

    Its tensors are copied to the device while queued work runs there. The images stay
    bytes; the model normalises them. An error of the loader is raised where the batch is asked for.
    """

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        """Take the loader.

        Args:
            batches: batches with images in pinned memory.
            device: of the model. Only to a GPU something is copied.
        """
        self._batches = iter(batches)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: Batch | Exception | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.fetch()
        found, self._next = self._next, None
        if isinstance(found, Exception):
            raise found
        assert found is not None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in _tensors(found):
                tensor.record_stream(current)  # or its memory could be used again too early
        return found

    def fetch(self) -> None:
        """Get the next batch, if that is not done, and start to copy it."""
        if self._next is not None:
            return
        try:
            self._next = next(self._batches)
        except Exception as error:
            self._next = error
            return
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._next = [{k: self._moved(v) for k, v in x.items()} for x in self._next]

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor):  # boxes and classes are checked on the host
            return value
        return value.to(self._device, non_blocking=True)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    for inputs in batch:
        yield from (value for value in inputs.values() if isinstance(value, Tensor))
