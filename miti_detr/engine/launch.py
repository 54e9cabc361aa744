"""Starting processes, and ending them well.

A user's error ends as one clear line, and Ctrl-C with the command that goes on.
"""

import argparse
import functools
import logging
import multiprocessing
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.utils.file_io import PathManager
from torch.multiprocessing.spawn import ProcessExitedException

from miti_detr.checkpoint.errors import CheckpointError
from miti_detr.data import check_datasets

from .hooks import NonFiniteError
from .setup import setup_config, setup_run_logger

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # exit code after SIGINT, by the convention of shells
_OF_THE_USER = (CheckpointError, NonFiniteError)  # errors that end a run with a message


def run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """Check config and data, then run ``main(args)`` in as many processes as asked for.

    Args:
        main: the work of one process; importable by name.
        args: of Detectron2's ``default_argument_parser``.

    Returns:
        Exit code: 0, 1 after an error of the user or a loss that is not finite, 130 after Ctrl-C.
        Errors of the program are raised.
    """
    output_dir = ""
    try:
        try:
            cfg = check_run(args)
        except (ValueError, OSError) as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        output_dir = cfg.OUTPUT_DIR
        if torch.device(cfg.MODEL.DEVICE).type == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else new processes talk through NCCL
        several = args.num_gpus * args.num_machines > 1
        work = functools.partial(_one_of_several, main) if several else main
        launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, (args,))
    except _OF_THE_USER as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        stop_processes()
        tell_how_to_resume(output_dir)
        return INTERRUPTED
    except ProcessExitedException as error:  # sys.exit, or killed
        sys.stderr.write(f"error: {error}\n")
        return max(error.exit_code, 1)
    return 0


def _one_of_several(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """The work of a started process: its errors of the user end it with one message."""
    try:
        return main(args)
    except _OF_THE_USER as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)


def check_run(args: argparse.Namespace) -> CfgNode:
    """Read the config and check it, the weights and the data before any long work.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Raises:
        ValueError: a value or the data are faulty.
        OSError: a file is missing or cannot be read.
    """
    world_size = max(args.num_gpus * args.num_machines, 1)
    cfg = setup_config(args.config_file, args.opts, world_size=world_size)
    if cfg.MODEL.DEVICE == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus {args.num_gpus}, but {torch.cuda.device_count()} are here")
    resumed = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if not resumed:
        check_weights(cfg, needed=args.eval_only)
    _check_output_dir(cfg.OUTPUT_DIR)
    setup_run_logger(cfg.OUTPUT_DIR)  # what is said of the data belongs into the log of the run
    check_datasets(cfg, eval_only=args.eval_only)
    return cfg


def check_weights(cfg: CfgNode, *, needed: bool = False) -> None:
    """Check that ``MODEL.WEIGHTS`` is there.

    Args:
        cfg: of a run.
        needed: it must not be empty, either.

    Raises:
        ValueError: it is empty.
        FileNotFoundError: there is no such file.
    """
    weights = cfg.MODEL.WEIGHTS.partition("?")[0]  # Detectron2 takes options behind a "?"
    if needed and not weights:
        raise ValueError("MODEL.WEIGHTS is empty: there is nothing to evaluate")
    if weights and "://" not in weights and not PathManager.exists(weights):
        raise FileNotFoundError(f"MODEL.WEIGHTS: there is no {weights}")


def _check_output_dir(folder: str) -> None:
    if "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR cannot be made: {error}") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"OUTPUT_DIR {folder} is not writable")


def stop_processes(patience: float = 5.0) -> None:
    """End the processes that this one has started.

    Args:
        patience: seconds each is given to end by itself: Ctrl-C in a terminal has reached it, too.
    """
    for process in multiprocessing.active_children():
        if not process.daemon:
            process.join(patience)
            if process.is_alive():
                process.terminate()
                process.join()


def tell_how_to_resume(output_dir: str) -> None:
    """Log the last checkpoint and the command that goes on from it.

    Args:
        output_dir: of the run; "" if it had not begun.
    """
    if not output_dir:
        sys.stderr.write("interrupted before the run began\n")
        return
    setup_run_logger(output_dir)
    tag = os.path.join(output_dir, "last_checkpoint")
    last = "there is no checkpoint yet"
    if os.path.isfile(tag):
        with open(tag, encoding="utf-8") as file:
            last = f"the last checkpoint is {os.path.join(output_dir, file.read().strip())}"
    logger.warning("interrupted; %s. To go on:\n%s", last, resume_command(sys.argv))


def resume_command(argv: list[str]) -> str:
    """The command line that resumes the run of another one.

    Args:
        argv: script and arguments of the run.
    """
    script, arguments = argv[0], [a for a in argv[1:] if a != "--resume"]
    return shlex.join([sys.executable, script, "--resume", *arguments])
