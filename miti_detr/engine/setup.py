"""From a YAML file and overrides to a checked config."""

import difflib
import functools
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

import miti_detr
from miti_detr.config import add_miti_detr_config
from miti_detr.data import register_coco_format, register_unlabeled
from miti_detr.layers import PADDING_MASK_RULES
from miti_detr.modeling.transformer import LAYER_RESIDUAL_STACKS, LAYER_RESIDUALS

logger = logging.getLogger(__name__)

_CHOICES: dict[str, tuple[str, ...]] = {
    "SOLVER.OPTIMIZER": ("ADAMW", "SGD"),
    "SOLVER.AMP.PRECISION": ("float16", "bfloat16"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm", "full_model"),
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupMultiStepLR",
        "WarmupCosineLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "MODEL.DETR.LAYER_RESIDUAL": LAYER_RESIDUALS,
    "MODEL.DETR.LAYER_RESIDUAL_IN": LAYER_RESIDUAL_STACKS,
    "MODEL.DETR.PADDING_MASK": PADDING_MASK_RULES,
    "MODEL.DETR.POSITION_EMBEDDING": ("sine", "learned"),
}
_AT_LEAST: dict[str, int] = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.IMS_PER_BATCH": 1,
    "SOLVER.BASE_LR": 0,
    "SOLVER.BACKBONE_MULTIPLIER": 0,
    "SOLVER.WEIGHT_DECAY": 0,
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0,
    "SOLVER.EPOCHS": 0,
    "TEST.EVAL_PERIOD": 0,
    "MODEL.DETR.RESIDUAL_RAMP_ITERS": 0,
    "MODEL.DETR.NUM_OBJECT_QUERIES": 1,
    "MODEL.DETR.NHEADS": 1,
    "INPUT.PATCHES.NUMBER": 0,
    "INPUT.PATCHES.SIZE": 1,
    "MODEL.UP_DETR.FEATURE_WEIGHT": 0,
}


def setup_config(
    config_file: str = "", opts: Sequence[str] = (), *, world_size: int | None = None
) -> CfgNode:
    """Read and check a config as ``train_net.py`` and ``miti-detr`` do.

    Registers the data sets of ``DATASETS.COCO_FORMAT`` and ``UNLABELED``; reads no data. Without a
    CUDA device, ``MODEL.DEVICE`` falls back to ``cpu``, with one warning.

    Args:
        config_file: YAML file; "" for the defaults.
        opts: alternating keys and values, applied last.
        world_size: number of processes of the run; None: of the running process group.

    Returns:
        The config, not frozen. ``SEED`` and ``SOLVER.EPOCHS`` are resolved later, by the trainer.

    Raises:
        FileNotFoundError: ``config_file`` does not exist.
        ValueError: a key is unknown or its value not possible; names key, value and what is
            possible.
    """
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    _merge(cfg, config_file, list(opts))
    register_coco_format(cfg)
    register_unlabeled(cfg)
    resolve_device(cfg)
    check_config(cfg, world_size=world_size or comm.get_world_size())
    return cfg


def setup_run_logger(output_dir: str) -> None:
    """Send the log of this package where Detectron2 sends its own: screen and ``log.txt``.

    Detectron2's ``default_setup`` does this for its own packages only.

    Args:
        output_dir: folder of ``log.txt``.
    """
    setup_logger(output_dir, distributed_rank=comm.get_rank(), name="miti_detr")


def version() -> str:
    """Return the version of this package and its git commit, in words."""
    return f"miti_detr {miti_detr.__version__}, git commit {_git_commit()}"


def log_version() -> None:
    """Log :func:`version`; Detectron2 logs those of the others."""
    logger.info(version())


def resolve_device(cfg: CfgNode) -> None:
    """Replace a CUDA ``MODEL.DEVICE`` by ``cpu`` where there is none.

    Args:
        cfg: changed in place; must not be frozen.

    Raises:
        ValueError: torch does not know the device.
    """
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is no device of torch") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        if comm.is_main_process():
            logger.warning("there is no CUDA device: MODEL.DEVICE %s becomes cpu", device)
        cfg.MODEL.DEVICE = "cpu"


def check_config(cfg: CfgNode, *, world_size: int = 1) -> None:
    """Check the values that training depends on.

    Args:
        cfg: with the keys of this package.
        world_size: number of processes.

    Raises:
        ValueError: names key, value, and what is possible.
    """
    for key, choices in _CHOICES.items():
        if (value := _get(cfg, key)) not in choices:
            raise ValueError(f"{key} is {value!r}; possible: {', '.join(choices)}")
    for key, minimum in _AT_LEAST.items():
        if not (value := _get(cfg, key)) >= minimum:
            raise ValueError(f"{key} is {value}; it must be at least {minimum}")
    width, heads = cfg.MODEL.DETR.HIDDEN_DIM, cfg.MODEL.DETR.NHEADS
    if width % heads:
        raise ValueError(
            f"MODEL.DETR.HIDDEN_DIM {width} is not divisible by MODEL.DETR.NHEADS {heads}"
        )
    scaled = cfg.SOLVER.REFERENCE_WORLD_SIZE > 0  # Detectron2 will fit the batch to the processes
    if cfg.SOLVER.IMS_PER_BATCH % world_size and not scaled:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which {world_size} processes "
            "cannot share equally; give a multiple"
        )
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError("TEST.PRECISE_BN.ENABLED is True, which is not supported; set it to False")
    _check_epochs(cfg)
    _check_amp(cfg)
    _check_patches(cfg)


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


def _merge(cfg: CfgNode, config_file: str, opts: list[str]) -> None:
    known = sorted(_keys(cfg))
    if config_file:
        if not PathManager.isfile(config_file):
            raise FileNotFoundError(f"the config file {config_file} does not exist")
        try:
            cfg.merge_from_file(config_file)
        except KeyError as error:
            unknown = str(error.args[0]).rpartition(" ")[2]
            raise ValueError(f"{config_file}: {_unknown_key(unknown, known)}") from error
        except (ValueError, AssertionError, yaml.YAMLError) as error:
            raise ValueError(f"{config_file}: {error}") from error
    if len(opts) % 2:
        raise ValueError(f"overrides come as KEY VALUE pairs; {opts[-1]!r} has no value")
    for key in opts[::2]:
        if key not in known:
            raise ValueError(_unknown_key(key, known))
    cfg.merge_from_list(opts)


def _unknown_key(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown config key {key}" + (f"; did you mean {close[0]}?" if close else "")


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")


def _get(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)


def _check_epochs(cfg: CfgNode) -> None:
    epochs, steps = cfg.SOLVER.EPOCHS, list(cfg.SOLVER.EPOCH_STEPS)
    if steps and epochs == 0:
        raise ValueError(f"SOLVER.EPOCH_STEPS is {steps}, which needs SOLVER.EPOCHS > 0 as well")
    if steps != sorted(set(steps)) or any(not 0 < step < epochs for step in steps):
        raise ValueError(
            f"SOLVER.EPOCH_STEPS is {steps}; needed: increasing, between 0 and SOLVER.EPOCHS "
            f"({epochs})"
        )


def _check_amp(cfg: CfgNode) -> None:
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and amp.PRECISION == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise ValueError(
            "SOLVER.AMP.PRECISION is 'float16', which needs a GPU; on a CPU set it to bfloat16"
        )


def _check_patches(cfg: CfgNode) -> None:
    patches, model = cfg.INPUT.PATCHES.NUMBER, cfg.MODEL.META_ARCHITECTURE
    if (model == "UpDetr") != (patches > 0):
        needed = "at least 1" if model == "UpDetr" else "0, or MODEL.META_ARCHITECTURE UpDetr"
        raise ValueError(f"INPUT.PATCHES.NUMBER is {patches}; a {model} needs {needed}")
    if patches > 0 and cfg.INPUT.CROP.ENABLED:
        raise ValueError("INPUT.CROP.ENABLED is True, which may cut patches away: set it to False")


def _git_commit() -> str:
    root = Path(miti_detr.__file__).parents[1]
    if not (root / ".git").exists():  # installed: a repository further up would be another one
        return "unknown"
    command = ["git", "-C", os.fspath(root), "rev-parse", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()
