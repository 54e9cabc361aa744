"""Checks of a run before any long work."""

import argparse
import functools
import os

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from miti_detr.data import check_datasets
from miti_detr.engine.resume import check_resumable
from miti_detr.engine.setup import setup_run_logger
from miti_detr.model_zoo import find_zoo_weights
from miti_detr.model_zoo.zoo import PREFIX as ZOO_PREFIX


def check_files(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Check numbers, weights and checkpoints before any long work.

    Args:
        args: as for :func:`run`.
        cfg: of the run.

    Raises:
        ValueError: a value or a file is faulty.
        OSError: a file is missing or cannot be read.
    """
    devices = torch.cuda.device_count()
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and (args.num_gpus or 1) > devices:
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, but this machine has {devices} GPUs. Lower it."
        )
    if not getattr(args, "timeout", 1) > 0:
        raise ValueError(f"--timeout is {args.timeout}; it must be more than 0 minutes.")
    if args.resume:
        check_resumable(cfg.OUTPUT_DIR)
    if not (args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        check_weights(cfg, needed=args.eval_only)
    if not args.eval_only:
        check_weights(cfg, key="MODEL.DETR.FROZEN_WEIGHTS")


def check_data(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Check the data before any long work; all processes of a group must call this together.

    Args:
        args: as for :func:`run`.
        cfg: of the run.

    Raises:
        ValueError: the data are faulty.
        OSError: a file is missing or cannot be read.
    """
    setup_run_logger(cfg.OUTPUT_DIR)  # the log of the run also holds what the check says
    check_datasets(cfg, eval_only=args.eval_only)


def check_weights(cfg: CfgNode, *, key: str = "MODEL.WEIGHTS", needed: bool = False) -> None:
    """Check that a file of weights exists; one with a URL is downloaded.

    Args:
        cfg: of a run.
        key: that names the file.
        needed: whether it must not be empty, either.

    Raises:
        ValueError: it is empty, or a damaged file of the zoo.
        FileNotFoundError: the file does not exist.
        OSError: it cannot be downloaded.
    """
    value: str = functools.reduce(getattr, key.split("."), cfg)
    weights = value.partition("?")[0]  # Detectron2 takes options behind a "?"
    if needed and not weights:
        raise ValueError(f"{key} is empty, so there is nothing to evaluate. Name a file.")
    if weights.startswith(ZOO_PREFIX):
        find_zoo_weights(weights[len(ZOO_PREFIX) :])
    elif "://" in weights:
        try:
            found = PathManager.isfile(PathManager.get_local_path(weights))
        except (OSError, ValueError, AssertionError) as error:  # of the many kinds of URLs
            reason = getattr(error, "reason", error)
            raise OSError(
                f"{key}: {weights} cannot be downloaded ({reason}). Download the file "
                f"yourself, and set {key} to its path."
            ) from error
        if not found:
            raise FileNotFoundError(f"{key}: {weights} names no file that can be read.")
    elif weights and not PathManager.exists(weights):
        raise FileNotFoundError(
            f"{key}: there is no file {weights}. `miti-detr zoo` lists the models of the package."
        )


def check_output_dir(folder: str) -> None:
    """Make the folder of a run.

    Args:
        folder: local or remote.

    Raises:
        OSError: it cannot be made, or nothing can be written there.
    """
    if "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"OUTPUT_DIR {folder} is not writable.")
