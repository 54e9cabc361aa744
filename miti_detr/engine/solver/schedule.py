"""The schedule of a run: its length, its learning rate, and what the batch changes in both."""

import logging
import math
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier, build_lr_scheduler
from detectron2.solver.lr_scheduler import WarmupParamScheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
)

logger = logging.getLogger(__name__)

FLAT_COSINE = "WarmupFlatCosineLR"
# Keys in iterations, which fewer or more images in a batch make more or fewer
_IN_ITERATIONS = (
    *("SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD"),
    "MODEL.DETR.RESIDUAL_RAMP_ITERS",
)
Scheduler = torch.optim.lr_scheduler.LRScheduler


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Scheduler:
    """Build ``SOLVER.LR_SCHEDULER_NAME``: one of Detectron2's, or ``WarmupFlatCosineLR``.

    The latter is flat from the warm-up to the first of ``SOLVER.STEPS``, and falls from there as
    half a cosine to ``SOLVER.BASE_LR_END`` at the end of the run.

    Args:
        cfg: with a resolved schedule.
        optimizer: whose learning rates are scheduled.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != FLAT_COSINE:
        return build_lr_scheduler(cfg, optimizer)
    flat = solver.STEPS[0] / solver.MAX_ITER
    curve = CompositeParamScheduler(
        [
            ConstantParamScheduler(1.0),
            CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR),
        ],
        lengths=[flat, 1 - flat],
        interval_scaling=["rescaled", "rescaled"],
    )
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    whole = WarmupParamScheduler(curve, solver.WARMUP_FACTOR, warmup, solver.WARMUP_METHOD)
    return LRMultiplier(optimizer, multiplier=whole, max_iter=solver.MAX_ITER)


def scale_to_batch(cfg: CfgNode) -> None:
    """Fit learning rate and schedule to a batch other than ``SOLVER.REFERENCE_BATCH``.

    The number of images stays: iterations become as many times more as the batch is smaller. The
    learning rate is scaled by the square root of the batch for AdamW (Malladi et al., On the SDEs
    and Scaling Rules for Adaptive Gradient Algorithms, 2022), and linearly for SGD (Goyal et al.,
    Accurate, Large Minibatch SGD, 2017). The log says what was changed.

    Args:
        cfg: changed in place; must not be frozen. Its reference becomes its own batch.
    """
    solver = cfg.SOLVER
    reference, batch = solver.REFERENCE_BATCH, solver.IMS_PER_BATCH
    if reference in (0, batch):
        return
    scale = batch / reference
    solver.REFERENCE_BATCH = batch
    factor = scale if solver.OPTIMIZER == "SGD" else math.sqrt(scale)
    changes = [f"SOLVER.BASE_LR {solver.BASE_LR:.4g} -> {solver.BASE_LR * factor:.4g}"]
    solver.BASE_LR *= factor
    solver.BASE_LR_END *= factor
    in_epochs = {"MAX_ITER": solver.EPOCHS > 0, "WARMUP_ITERS": solver.WARMUP_EPOCHS > 0}
    for key in _IN_ITERATIONS:
        value = _get(cfg, key)
        if value and not in_epochs.get(key.removeprefix("SOLVER.")):
            _set(cfg, key, max(1, round(value / scale)))
            changes.append(f"{key} {value} -> {_get(cfg, key)}")
    if solver.STEPS and not in_epochs["MAX_ITER"]:
        steps = tuple(dict.fromkeys(max(1, round(step / scale)) for step in solver.STEPS))
        changes.append(f"SOLVER.STEPS {tuple(solver.STEPS)} -> {steps}")
        solver.STEPS = steps
    logger.info(
        "SOLVER.REFERENCE_BATCH %d, IMS_PER_BATCH %d: the learning rate is scaled by %.4g (%s), "
        "iterations by %.4g: %s",
        *(reference, batch, factor, "linear" if solver.OPTIMIZER == "SGD" else "square root"),
        *(1 / scale, ", ".join(changes)),
    )


def resolve_schedule(cfg: CfgNode, num_images: int | None) -> None:
    """Replace epochs by iterations.

    ``EPOCHS`` and ``EPOCH_STEPS`` replace ``MAX_ITER`` and ``STEPS``, ``WARMUP_EPOCHS`` replaces
    ``WARMUP_ITERS``, where these are used. Steps that the run does not reach are dropped. An epoch
    has ``num_images // IMS_PER_BATCH`` iterations, at least one: as in DETR's own training, an
    incomplete last batch is not counted.

    Args:
        cfg: changed in place; must not be frozen.
        num_images: length of the training set after filtering; None if it is not known.

    Raises:
        ValueError: the schedule is in epochs, and the length is not known; or the flat part of a
            schedule has no end.
    """
    solver = cfg.SOLVER
    for key in ("EPOCHS", "WARMUP_EPOCHS"):
        if num_images is None and solver[key] > 0:
            raise ValueError(
                f"SOLVER.{key} is {solver[key]}, but the data loader does not tell how many images "
                f"there are; set SOLVER.{key} to 0 and give iterations"
            )
    per_epoch = max(1, (num_images or 0) // solver.IMS_PER_BATCH)
    if solver.EPOCHS > 0:
        solver.MAX_ITER = solver.EPOCHS * per_epoch
        solver.STEPS = tuple(epoch * per_epoch for epoch in solver.EPOCH_STEPS)
    if solver.WARMUP_EPOCHS > 0:
        solver.WARMUP_ITERS = max(1, round(solver.WARMUP_EPOCHS * per_epoch))
    dropped = [step for step in solver.STEPS if step >= solver.MAX_ITER]
    if dropped:
        logger.warning(
            "SOLVER.STEPS %s are not before the end of the run, MAX_ITER %d: they have no effect",
            *(dropped, solver.MAX_ITER),
        )
    solver.STEPS = tuple(step for step in solver.STEPS if step < solver.MAX_ITER)
    if solver.LR_SCHEDULER_NAME == FLAT_COSINE and len(solver.STEPS) != 1:
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME is {FLAT_COSINE}, which is flat up to the one iteration in "
            f"SOLVER.STEPS (or epoch in EPOCH_STEPS), but there are {len(solver.STEPS)} before "
            f"MAX_ITER {solver.MAX_ITER}. Give one: SOLVER.STEPS '({solver.MAX_ITER // 2},)'."
        )


def num_images(data_loader: Any) -> int | None:
    """Return the length of the training set; None if the loader has none."""
    try:
        return len(data_loader.dataset)
    except (AttributeError, TypeError):
        return None


def _get(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _set(cfg: CfgNode, key: str, value: int) -> None:
    section, _, name = key.rpartition(".")
    _get(cfg, section)[name] = value
