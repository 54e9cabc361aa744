"""One model in several processes, and one batch in several parts."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from miti_detr.modeling import SetCriterion

Batch = list[dict[str, Any]]


def wrap_for_processes(model: nn.Module) -> nn.Module:
    """Let several processes train one model; a single process gets the model itself.

    Detectron2's own function names a GPU, which torch refuses for a model on the CPU, and expects
    every parameter to be used: those of unused levels of a feature pyramid are not, nor are heads
    of decoder layers without a loss.

    Args:
        model: on its device.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).device.type == "cuda"
    devices = [comm.get_local_rank()] if on_gpu else None
    parts = (model, getattr(model, "backbone", None))
    return DistributedDataParallel(
        model,
        device_ids=devices,
        broadcast_buffers=False,
        find_unused_parameters=any(getattr(part, "has_idle_parts", False) for part in parts),
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of :func:`wrap_for_processes`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def split_batch(batch: Batch, number: int) -> list[Batch]:
    """Cut a batch into ``number`` parts of the same length, the last one shorter if need be."""
    length = -(-len(batch) // number)
    return [batch[start : start + length] for start in range(0, len(batch), length)]


def count_objects(batch: Batch) -> list[int]:
    """Count the objects of each image of a batch."""
    return [len(inputs["instances"]) if "instances" in inputs else 0 for inputs in batch]


@contextlib.contextmanager
def part_of_batch(model: nn.Module, part: Batch, counts: Sequence[int]) -> Iterator[float]:
    """While entered, the model is trained on a part of a larger batch.

    Args:
        model: may be wrapped.
        part: the images of the part.
        counts: :func:`count_objects` of the larger batch, in this process.

    Yields:
        Factor of the losses. The model's own criterion knows how to share a batch: 1. Losses of
        other models are taken as means over images.
    """
    criterion = getattr(unwrapped(model), "criterion", None)
    if len(part) == len(counts):
        yield 1.0
    elif isinstance(criterion, SetCriterion):
        criterion.whole_batch = counts
        try:
            yield 1.0
        finally:
            criterion.whole_batch = None
    else:
        yield len(part) / len(counts)


@contextlib.contextmanager
def gradients_kept(model: nn.Module, kept: bool) -> Iterator[None]:
    """While entered, do not exchange gradients with the other processes if ``kept``."""
    if kept and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        yield
