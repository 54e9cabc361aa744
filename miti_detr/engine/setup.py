"""From a YAML file and overrides to a checked config."""

import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import miti_detr
from miti_detr.config import add_miti_detr_config
from miti_detr.data import register_coco_format, register_panoptic_format, register_unlabeled
from miti_detr.model_keys import check_model_keys
from miti_detr.yaml_files import read_config

from .merge import merge_content, merge_options
from .run_keys import check_run_keys

logger = logging.getLogger(__name__)


def setup_config(
    config: str | Mapping[str, Any] = "",
    opts: Sequence[str] = (),
    *,
    world_size: int | None = None,
    source: str = "the config",
) -> CfgNode:
    """Read and check a config as ``train_net.py`` and ``miti-detr`` do.

    Registers the data sets of ``DATASETS.COCO_FORMAT``; reads no data. Without a CUDA device,
    ``MODEL.DEVICE`` falls back to ``cpu``, with one warning.

    Args:
        config: YAML file; or what :func:`~miti_detr.yaml_files.parse_config` returns; "" for the
            defaults.
        opts: alternating keys and values, applied last.
        world_size: number of processes of the run; None: of the running process group.
        source: name of a ``config`` that is no file, for messages.

    Returns:
        The config, not frozen. ``SEED`` and ``SOLVER.EPOCHS`` are resolved later, by the trainer.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a file is not a valid config, or a key is unknown or its value not possible;
            names key, value and remedy.
    """
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    if isinstance(config, str) and config:
        merge_content(cfg, read_config(config), config)
    elif config:
        merge_content(cfg, config, source)
    merge_options(cfg, opts)
    resolve_device(cfg)
    check_config(cfg, world_size=world_size or comm.get_world_size())
    register_coco_format(cfg)
    register_panoptic_format(cfg)
    register_unlabeled(cfg)
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
        raise ValueError(
            f"MODEL.DEVICE {cfg.MODEL.DEVICE!r} is not a device of torch. Use cpu or cuda."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        if comm.is_main_process():
            logger.warning("there is no CUDA device: MODEL.DEVICE %s becomes cpu", device)
        cfg.MODEL.DEVICE = "cpu"


def check_config(cfg: CfgNode, *, world_size: int = 1) -> None:
    """Check all values that a run reads, before it begins.

    Args:
        cfg: with the keys of this package.
        world_size: number of processes.

    Raises:
        ValueError: names key, value and remedy.
    """
    check_run_keys(cfg, world_size=world_size)
    check_model_keys(cfg)


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
