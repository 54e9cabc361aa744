"""What a run will do, logged before its first step, and doubts whether it can work."""

import logging
import math
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from miti_detr.modeling import MitiDetr

logger = logging.getLogger(__name__)

# The published training of DETR R50: learning rate, images in a batch, width, and the steps of 150
# epochs of COCO, up to which its curve rises steeply
_RATE, _BATCH, _WIDTH, _STEPS = 1e-4, 64, 256, 277_200
_FEW = 50_000  # steps from which a transformer of full size has never been seen to work
_FULL_LAYERS = 8  # encoder and decoder layers together that count as full size
_HIGH = 8.0  # times the published learning rate that is too much
_HIGH_ADAMW = 5e-3  # learning rate that is too much for any model with ADAMW, but not with SGD


def log_plan(cfg: CfgNode, *, num_images: int | None, start: int, from_scratch: bool) -> None:
    """Log the plan of a run, and a warning for each reason why it may not work.

    Args:
        cfg: with a resolved schedule.
        num_images: of the training set; None if it is not known.
        start: first iteration.
        from_scratch: the transformer has random weights.
    """
    logger.info("plan: %s", describe_plan(cfg, num_images=num_images, start=start))
    if start == 0:
        for doubt in doubts(cfg, num_images=num_images, from_scratch=from_scratch):
            logger.warning("%s", doubt)


def describe_plan(cfg: CfgNode, *, num_images: int | None, start: int) -> str:
    """Describe what is left of a run: epochs, iterations, images, evaluations, checkpoints."""
    solver, end = cfg.SOLVER, cfg.SOLVER.MAX_ITER
    left = max(end - start, 0)
    text = f"{left:,} iterations of {solver.IMS_PER_BATCH} images"
    if solver.ACCUMULATE > 1:
        text += f" in {solver.ACCUMULATE} parts"
    text += f", {left * solver.IMS_PER_BATCH:,} images in all"
    if num_images is not None:
        per_epoch = max(1, num_images // solver.IMS_PER_BATCH)
        text += (
            f": {left / per_epoch:.4g} epochs of {num_images:,} images ({per_epoch:,} iterations)"
        )
    evaluations = _times(start, end, cfg.TEST.EVAL_PERIOD) if cfg.DATASETS.TEST else 0
    text += f"; {evaluations} evaluations"
    text += f", {_times(start, end, solver.CHECKPOINT_PERIOD)} checkpoints"
    return f"{text}; learning rate {solver.BASE_LR:.4g}, {_shape(cfg)}"


def describe_speed(seconds: float, left: int) -> str:
    """Say how long the rest of a run takes.

    Args:
        seconds: of an iteration, as measured.
        left: iterations.
    """
    hours = seconds * left / 3600
    time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    return (
        f"an iteration takes {seconds:.3g} s: {time} for the other {left:,}, without evaluations "
        "and checkpoints"
    )


def doubts(cfg: CfgNode, *, num_images: int | None, from_scratch: bool) -> Iterator[str]:
    """Yield reasons why a run may not work; arguments as of :func:`log_plan`."""
    solver, detr = cfg.SOLVER, cfg.MODEL.DETR
    steps, batch = solver.MAX_ITER, solver.IMS_PER_BATCH
    is_full = detr.HIDDEN_DIM >= _WIDTH and detr.ENC_LAYERS + detr.DEC_LAYERS >= _FULL_LAYERS
    if from_scratch and is_full and cfg.MODEL.META_ARCHITECTURE == "MitiDetr" and steps < _FEW:
        yield (
            f"the transformer starts from random weights, and {steps:,} steps are few: DETR of "
            f"this size was trained for {_STEPS:,} or more, and its AP stays near 0 for the first "
            "ten thousands. Start from weights of DETR (MODEL.WEIGHTS), or train a smaller model."
        )
    published = _RATE * math.sqrt(batch / _BATCH)
    high = _HIGH * max(1.0, _WIDTH / detr.HIDDEN_DIM)
    is_adamw, rate = solver.OPTIMIZER == "ADAMW", solver.BASE_LR
    if is_adamw and not _is_detr(cfg) and rate > _HIGH_ADAMW:
        yield (
            f"SOLVER.OPTIMIZER is ADAMW, for which SOLVER.BASE_LR {rate:g} is too much. A config "
            "of Detectron2's own needs SOLVER.OPTIMIZER SGD SOLVER.BACKBONE_MULTIPLIER 1.0"
        )
    if is_adamw and _is_detr(cfg) and high * published < rate:
        yield (
            f"SOLVER.BASE_LR {rate:g} is {rate / published:.0f} times that of "
            f"DETR ({_RATE:g} for {_BATCH} images, {published:.2g} for {batch}): the training may "
            f"not leave its start. Set {published:.2g}, or {_RATE:g} with REFERENCE_BATCH {_BATCH}."
        )
    if steps <= solver.WARMUP_ITERS and solver.WARMUP_FACTOR < 1:
        yield f"SOLVER.WARMUP_ITERS {solver.WARMUP_ITERS} is not before the end of {steps:,} steps"
    if num_images is not None and batch > num_images:
        yield f"SOLVER.IMS_PER_BATCH {batch} is more than the {num_images} images of the data"
    stop = solver.EARLY_STOP.PATIENCE * cfg.TEST.EVAL_PERIOD
    if stop >= steps:
        yield (
            f"SOLVER.EARLY_STOP.PATIENCE {solver.EARLY_STOP.PATIENCE} x TEST.EVAL_PERIOD "
            f"{cfg.TEST.EVAL_PERIOD} is not before the end of {steps:,} steps: it cannot stop"
        )
    if solver.EMA.ENABLED:
        yield from _doubts_of_average(solver.EMA, steps)


def _is_detr(cfg: CfgNode) -> bool:
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(model, type) and issubclass(model, MitiDetr)


def _doubts_of_average(ema: CfgNode, steps: int) -> Iterator[str]:
    grown = 1 - math.exp(-steps / ema.WARMUP) if ema.WARMUP else 1.0
    memory = 1 / (1 - ema.DECAY * grown)
    if memory > steps / 3:
        yield (
            f"SOLVER.EMA.DECAY {ema.DECAY:g} averages over {memory:,.0f} steps at the end of "
            f"{steps:,}: the average still has the first weights. Set "
            f"{max(0.0, 1 - 10 / steps):.4g}, or a longer SOLVER.EMA.WARMUP."
        )


def _times(start: int, end: int, period: int) -> int:
    """How often something happens that is done every ``period`` iterations and at the end."""
    return (max(0, (end - 1) // period - start // period) if period else 0) + (end > start)


def _shape(cfg: CfgNode) -> str:
    """The course of the learning rate, in words."""
    solver = cfg.SOLVER
    warmup = ""
    if solver.WARMUP_ITERS > 0 and solver.WARMUP_FACTOR < 1:
        warmup = f" after a warm-up of {solver.WARMUP_ITERS:,} iterations"
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = ", ".join(f"{step:,}" for step in solver.STEPS)
        return f"times {solver.GAMMA:g} at {steps}{warmup}" if steps else f"constant{warmup}"
    if solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        return f"times {solver.GAMMA:g} in {solver.NUM_DECAYS} steps{warmup}"
    flat = f", flat up to {solver.STEPS[0]:,}" if "Flat" in solver.LR_SCHEDULER_NAME else ""
    return f"along a cosine to {solver.BASE_LR_END:.4g}{flat}{warmup}"
