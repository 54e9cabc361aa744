"""The schedule of a run."""

import logging
from typing import Any

from detectron2.config import CfgNode

logger = logging.getLogger(__name__)


def resolve_schedule(cfg: CfgNode, num_images: int | None) -> None:
    """Replace ``MAX_ITER`` and ``STEPS`` by ``EPOCHS`` and ``EPOCH_STEPS`` where these are used.

    Steps that the run does not reach are dropped. An epoch has ``num_images // IMS_PER_BATCH``
    iterations, at least one: as in DETR's own training, an incomplete last batch is not counted.

    Args:
        cfg: changed in place; must not be frozen.
        num_images: length of the training set after filtering; None if it is not known.

    Raises:
        ValueError: the schedule is in epochs, and the length is not known.
    """
    solver = cfg.SOLVER
    if num_images is None and solver.EPOCHS > 0:
        raise ValueError(
            f"SOLVER.EPOCHS is {solver.EPOCHS}, but the data loader does not tell how many "
            "images there are; set SOLVER.EPOCHS to 0 and give SOLVER.MAX_ITER"
        )
    per_epoch = max(1, (num_images or 0) // solver.IMS_PER_BATCH)
    if solver.EPOCHS > 0:
        solver.MAX_ITER = solver.EPOCHS * per_epoch
        solver.STEPS = tuple(epoch * per_epoch for epoch in solver.EPOCH_STEPS)
    solver.STEPS = tuple(step for step in solver.STEPS if step < solver.MAX_ITER)
    if num_images is None:
        return
    logger.info(
        "%d training images in batches of %d: an epoch has %d iterations; MAX_ITER %d is %.4g "
        "epochs; STEPS %s",
        num_images,
        solver.IMS_PER_BATCH,
        per_epoch,
        solver.MAX_ITER,
        solver.MAX_ITER / per_epoch,
        tuple(solver.STEPS),
    )


def num_images(data_loader: Any) -> int | None:
    """Return the length of the training set; None if the loader has none."""
    try:
        return len(data_loader.dataset)
    except (AttributeError, TypeError):
        return None
