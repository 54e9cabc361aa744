"""Rules of the keys of solver, data and evaluation, most of which Detectron2's own code uses."""

import math

import torch
from detectron2.config import CfgNode

from miti_detr.checks import AnyOf, Choice, Each, Real, Rule, Text, Whole, check, check_keys

from .hooks.loggers import check_loggers
from .solver.schedule import FLAT_COSINE

_SIDE = Whole(1, 100_000)  # pixels
_SIDES = AnyOf((_SIDE, Each(_SIDE, shortest=1)))  # Detectron2 takes one value for a list of one
_MINIMUM_SIDE = AnyOf((Whole(0, 100_000), Each(Whole(0, 100_000), shortest=1)))  # 0: no resize
_FACTOR = Real(0, 1e6)
_VIEW_FACTOR = 3  # between the sizes of views and of the usual evaluation; more is a mistake

_RULES: dict[str, Rule] = {
    "SEED": Whole(-(2**31), 2**31 - 1),
    "SOLVER.OPTIMIZER": Choice(("ADAMW", "SGD")),
    "SOLVER.LR_SCHEDULER_NAME": Choice(
        ("WarmupMultiStepLR", "WarmupCosineLR", FLAT_COSINE, "WarmupStepWithFixedGammaLR")
    ),
    "SOLVER.MAX_ITER": Whole(1),
    "SOLVER.STEPS": Each(Whole(1), increasing=True),
    "SOLVER.EPOCHS": Whole(0, 10**6),
    "SOLVER.EPOCH_STEPS": Each(Whole(1, 10**6), increasing=True),
    "SOLVER.IMS_PER_BATCH": Whole(1, 10**6),
    "SOLVER.ACCUMULATE": Whole(0, 10**6),
    "SOLVER.REFERENCE_BATCH": Whole(0, 10**6),
    "SOLVER.REFERENCE_WORLD_SIZE": Whole(0, 10**6),
    "SOLVER.CHECKPOINT_PERIOD": Whole(1),
    "SOLVER.BASE_LR": _FACTOR,
    "SOLVER.BASE_LR_END": _FACTOR,
    "SOLVER.SAMPLING_MULTIPLIER": _FACTOR,
    "SOLVER.BIAS_LR_FACTOR": _FACTOR,
    "SOLVER.MOMENTUM": Real(0, 1, below=True),
    "SOLVER.WEIGHT_DECAY": _FACTOR,
    "SOLVER.WEIGHT_DECAY_BIAS": AnyOf((Choice((None,)), _FACTOR)),
    "SOLVER.GAMMA": Real(0, 1e3),
    "SOLVER.NUM_DECAYS": Whole(0, 1000),
    "SOLVER.WARMUP_FACTOR": Real(0, 1),
    "SOLVER.WARMUP_ITERS": Whole(0),
    "SOLVER.WARMUP_EPOCHS": Real(0, 1e6),
    "SOLVER.WARMUP_METHOD": Choice(("linear", "constant")),
    "SOLVER.FREEZE": Each(Text()),
    "SOLVER.EMA.DECAY": Real(0, 1, below=True),
    "SOLVER.EMA.WARMUP": Whole(0),
    "SOLVER.EMA.PERIOD": Whole(1),
    "SOLVER.EARLY_STOP.PATIENCE": Whole(0),
    "SOLVER.EARLY_STOP.MIN_DELTA": Real(0, 1e6),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": Choice(("value", "norm", "full_model")),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Real(0, 1e6, above=True),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Real(0, math.inf, above=True, infinite=True),
    "TEST.EVAL_PERIOD": Whole(0),
    "TEST.IMS_PER_BATCH": Whole(1, 10**6),
    "TEST.AUG.MIN_SIZES": Each(Whole(0, 100_000), shortest=1),
    "TEST.AUG.MAX_SIZE": _SIDE,
    "TEST.PRECISE_BN.ENABLED": Choice((False,)),  # this trainer does not have it
    "DATASETS.TRAIN_SHARE": Real(0, 1, above=True),
    "DATALOADER.NUM_WORKERS": Whole(0, 1024),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": Choice(("choice", "range")),
    "INPUT.MIN_SIZE_TRAIN": _SIDES,
    "INPUT.MAX_SIZE_TRAIN": _SIDE,
    "INPUT.MIN_SIZE_TEST": _MINIMUM_SIDE,
    "INPUT.MAX_SIZE_TEST": _SIDE,
    "INPUT.RANDOM_FLIP": Choice(("none", "horizontal", "vertical")),
    "INPUT.CROP.TYPE": Choice(("relative", "relative_range", "absolute", "absolute_range")),
    "INPUT.CROP.MIN_SIZE_BEFORE": Each(_SIDE, shortest=1),
}


def check_run_keys(cfg: CfgNode, *, world_size: int = 1) -> None:
    """Check the keys of solver, data and evaluation.

    Args:
        cfg: with the keys of this package.
        world_size: number of processes.

    Raises:
        ValueError: names key, value and remedy.
    """
    check_keys(cfg, _RULES)
    _check_crop(cfg)
    _check_epochs(cfg)
    _check_rates(cfg)
    _check_batch(cfg, world_size)
    _check_early_stop(cfg)
    _check_amp(cfg)
    _check_patches(cfg)
    _check_augmentation(cfg)
    check_loggers(cfg.LOGGERS)


def _check_crop(cfg: CfgNode) -> None:
    side: Rule = _SIDE
    if cfg.INPUT.CROP.TYPE.startswith("relative"):
        side = Real(0, 1, above=True)
    check("INPUT.CROP.SIZE", cfg.INPUT.CROP.SIZE, Each(side, shortest=2, longest=2))
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        sides = Each(_SIDE, shortest=2, longest=2)
        check("INPUT.MIN_SIZE_TRAIN", cfg.INPUT.MIN_SIZE_TRAIN, sides)


def _check_batch(cfg: CfgNode, world_size: int) -> None:
    batch, parts = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    if cfg.SOLVER.REFERENCE_WORLD_SIZE > 0 and cfg.SOLVER.REFERENCE_BATCH > 0:
        raise ValueError(
            f"SOLVER.REFERENCE_BATCH is {cfg.SOLVER.REFERENCE_BATCH} and REFERENCE_WORLD_SIZE is "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE}, and both would scale the schedule. Set one to 0."
        )
    if cfg.SOLVER.REFERENCE_WORLD_SIZE > 0:  # Detectron2 will fit the batch to the processes
        batch = round(batch * world_size / cfg.SOLVER.REFERENCE_WORLD_SIZE)
    elif batch % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch}, which {world_size} processes cannot share equally. "
            "Give a multiple."
        )
    if parts == 0:
        _check_probe(cfg)
        return
    share = batch // world_size
    if share % parts:
        raise ValueError(
            f"SOLVER.ACCUMULATE is {parts}, which cannot cut the {share} images of a process into "
            "equal parts. Give a divisor."
        )


def _check_probe(cfg: CfgNode) -> None:
    """What excludes ``SOLVER.ACCUMULATE 0``: steps whose memory cannot be tried beforehand."""
    for key, value in (
        ("MODEL.CUDA_GRAPHS", cfg.MODEL.CUDA_GRAPHS),
        ("MODEL.BACKBONE.CACHE_FEATURES", cfg.MODEL.BACKBONE.CACHE_FEATURES),
        ("INPUT.PATCHES.NUMBER", cfg.INPUT.PATCHES.NUMBER),
    ):
        if value:
            raise ValueError(
                f"SOLVER.ACCUMULATE is 0 and {key} is {value}, whose memory cannot be probed. Set "
                "SOLVER.ACCUMULATE to a number of parts."
            )


def _check_epochs(cfg: CfgNode) -> None:
    epochs, steps = cfg.SOLVER.EPOCHS, list(cfg.SOLVER.EPOCH_STEPS)
    if steps and epochs == 0:
        raise ValueError(f"SOLVER.EPOCH_STEPS is {steps}, which needs SOLVER.EPOCHS > 0 as well")
    if any(step >= epochs for step in steps):
        raise ValueError(
            f"SOLVER.EPOCH_STEPS is {steps}; each step must be between 0 and SOLVER.EPOCHS "
            f"({epochs})"
        )


def _check_rates(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    if "Cosine" in solver.LR_SCHEDULER_NAME and not 0 < solver.BASE_LR >= solver.BASE_LR_END:
        raise ValueError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}; with {solver.LR_SCHEDULER_NAME} it must "
            f"be at most SOLVER.BASE_LR ({solver.BASE_LR}), which must be above 0."
        )


def _check_early_stop(cfg: CfgNode) -> None:
    patience = cfg.SOLVER.EARLY_STOP.PATIENCE
    if patience > 0 and not (cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST):
        raise ValueError(
            f"SOLVER.EARLY_STOP.PATIENCE is {patience}, but there are no evaluations. Set "
            "TEST.EVAL_PERIOD and DATASETS.TEST, or PATIENCE 0."
        )


def _check_amp(cfg: CfgNode) -> None:
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and amp.PRECISION == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise ValueError(
            "SOLVER.AMP.PRECISION is 'float16', which needs a GPU. On a CPU set it to bfloat16."
        )


def _check_patches(cfg: CfgNode) -> None:
    patches, model = cfg.INPUT.PATCHES.NUMBER, cfg.MODEL.META_ARCHITECTURE
    if (model == "UpDetr") != (patches > 0):
        needed = "at least 1" if model == "UpDetr" else "0, or MODEL.META_ARCHITECTURE UpDetr"
        raise ValueError(f"INPUT.PATCHES.NUMBER is {patches}; a {model} needs {needed}")
    if patches > 0 and cfg.INPUT.CROP.ENABLED:
        raise ValueError("INPUT.CROP.ENABLED is True, which may cut patches away. Set it to False.")


def _check_augmentation(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    for key, value in (
        ("MODEL.MASK_ON", cfg.MODEL.MASK_ON),
        ("INPUT.PATCHES.NUMBER", cfg.INPUT.PATCHES.NUMBER),
    ):
        if value:
            raise ValueError(
                f"TEST.AUG.ENABLED is True and {key} is {value}, but only boxes of objects can be "
                "merged. Set TEST.AUG.ENABLED False."
            )
    sizes, usual = tuple(cfg.TEST.AUG.MIN_SIZES), cfg.INPUT.MIN_SIZE_TEST
    if isinstance(usual, int) and any(
        size and usual and not usual <= _VIEW_FACTOR * size <= _VIEW_FACTOR**2 * usual
        for size in sizes
    ):
        raise ValueError(
            f"TEST.AUG.MIN_SIZES is {sizes}, but INPUT.MIN_SIZE_TEST is {usual}; sizes that differ "
            f"by a factor of more than {_VIEW_FACTOR} are not those of this model. Set "
            f"TEST.AUG.MIN_SIZES, such as ({usual},)."
        )
