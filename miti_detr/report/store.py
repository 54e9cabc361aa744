"""The recommended threshold, recorded with the weights."""

from typing import Any

import torch

from miti_detr.checkpoint.errors import CheckpointError
from miti_detr.checkpoint.files import read_checkpoint
from miti_detr.checkpoint.variant import RECORD_KEY, THRESHOLD, check_record
from miti_detr.files import atomic_write


def check_can_store(path: str) -> None:
    """Check that a file is a checkpoint that records a threshold, before long work.

    Raises:
        CheckpointError: it cannot be read, or it is not a checkpoint of this package.
    """
    _read(path)


def store_threshold(path: str, threshold: float) -> None:
    """Record a threshold in a checkpoint, which is replaced whole; all else in it stays.

    Args:
        path: file that :class:`~miti_detr.checkpoint.MitiDetrCheckpointer` or ``miti-detr convert``
            has written.
        threshold: lowest score of a detection, in 0..1; ``load_predictor`` takes it by default.

    Raises:
        CheckpointError: as :func:`check_can_store`, or the threshold is not possible.
    """
    checkpoint = _read(path)
    record = {**checkpoint[RECORD_KEY], THRESHOLD: float(threshold)}
    check_record(record)
    with atomic_write(path) as file:
        torch.save({**checkpoint, RECORD_KEY: record}, file)


def _read(path: str) -> dict[str, Any]:
    checkpoint = read_checkpoint(path) if path.endswith(".pth") else {}
    if not isinstance(checkpoint.get(RECORD_KEY), dict):
        raise CheckpointError(
            f"{path}: no threshold can be stored in it, only in checkpoints of this package. "
            "`miti-detr convert --to ours` makes one of other weights"
        )
    return checkpoint
