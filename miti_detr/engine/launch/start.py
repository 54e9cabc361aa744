"""Starting a run, and ending it well.

An error of the user ends in one clear line, Ctrl-C and SIGTERM with the command that resumes.
"""

import argparse
import contextlib
import functools
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import distributed

from miti_detr.engine.setup import setup_config, setup_run_logger

from .checks import check_data, check_files, check_output_dir
from .errors import log_errors_in_one_line, user_message
from .heartbeat import tell_once
from .processes import (
    Place,
    connect,
    forks_die_with_parent,
    joined,
    passed_in_main_process,
    place_from_environment,
    spawn,
)
from .run_lock import run_lock

logger = logging.getLogger(__name__)

INTERRUPTED = 128 + signal.SIGINT  # exit codes by the convention of shells
TERMINATED = 128 + signal.SIGTERM
TIMEOUT = 10.0  # minutes

Main = Callable[[argparse.Namespace], Any]


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`run` reads beside the arguments of ``default_argument_parser``.

    Args:
        parser: of Detectron2's ``default_argument_parser``; its defaults are changed so that any
            free port is used, and ``--num-gpus`` need not repeat what ``torchrun`` was told.
    """
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help="minutes after which a silent process ends the run (default: %(default)g)",
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error comes from, not only its line"
    )
    parser.set_defaults(dist_url="auto", num_gpus=None)


def run(main: Main, args: argparse.Namespace, *, patience: float = 0.0) -> int:
    """Check config and data, then run ``main(args)`` in as many processes as asked for.

    The processes are started here, one for each of ``--num-gpus``, or this process is one of those
    that ``torchrun`` or a script for SLURM has started (:mod:`miti_detr.engine.launch.processes`).

    Args:
        main: the work of one process; importable by name.
        args: of :func:`add_run_arguments`, or only of Detectron2's ``default_argument_parser``;
            ``command`` is the command that resumes, if it is not this one with ``--resume``.
        patience: seconds to wait for another run in ``OUTPUT_DIR`` to end.

    Returns:
        Exit code: 0, 1 after an error of the user or a loss that is not finite, 130 after Ctrl-C,
        143 after SIGTERM. Errors of the program are raised.
    """
    log_errors_in_one_line()
    output_dir: list[str] = []  # once it is known

    def work() -> int:
        """Take the place that this process has."""
        place = place_from_environment(
            os.environ, num_gpus=args.num_gpus, num_machines=args.num_machines
        )
        if place is not None:
            return _run_one_of_several(main, args, patience, output_dir, place)
        count = _process_count(args)
        cfg = setup_config(args.config_file, args.opts, world_size=count * args.num_machines)
        with _prepared(args, cfg, patience, output_dir):
            check_data(args, cfg)
            if count * args.num_machines == 1:
                main(args)
                return 0
            return _spawn(main, args, count)

    # A closed terminal or a full disk is no reason for a traceback of each log line.
    logging.raiseExceptions = False
    with _sigterm_raises(), forks_die_with_parent():
        try:
            return _exit_code(work, args)
        except KeyboardInterrupt as stop:
            if comm.is_main_process():
                command = getattr(args, "command", None) or resume_command(sys.argv)
                tell_how_to_resume("".join(output_dir[:1]), command)
            return TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED


def _exit_code(
    work: Callable[[], int], args: argparse.Namespace, store: distributed.Store | None = None
) -> int:
    """Do the work; an error of the user becomes one line and the exit code 1."""
    try:
        return work()
    except Exception as error:
        message = user_message(error)
        if message is None or getattr(args, "traceback", False):
            raise
        tell_once(store, message)
        return 1


@contextlib.contextmanager
def _prepared(
    args: argparse.Namespace, cfg: CfgNode, patience: float, output_dir: list[str]
) -> Iterator[None]:
    """Check the run, and lock its folder meanwhile; only in its first process."""
    check_output_dir(cfg.OUTPUT_DIR)
    with run_lock(cfg.OUTPUT_DIR, patience=patience):
        output_dir.append(cfg.OUTPUT_DIR)
        check_files(args, cfg)
        yield


def _run_one_of_several(
    main: Main, args: argparse.Namespace, patience: float, output_dir: list[str], place: Place
) -> int:
    """The work of one of the processes that were started elsewhere; the first one checks."""
    cfg = setup_config(args.config_file, args.opts, world_size=place.world_size)
    with contextlib.ExitStack() as stack:

        def check() -> None:
            """Check the run, and keep its folder locked until it ends."""
            stack.enter_context(_prepared(args, cfg, patience, output_dir))

        return _work_in_group(main, args, place, check=check)


def _work_in_group(
    main: Main,
    args: argparse.Namespace,
    place: Place,
    *,
    check: Callable[[], None] | None = None,
) -> int:
    """Join the process group and do the work of one process.

    Args:
        main: as for :func:`run`.
        args: as for :func:`run`.
        place: of this process.
        check: called in the main process before the work begins; None: that is done.
    """
    timeout = 60 * getattr(args, "timeout", TIMEOUT)
    store = connect(place, timeout)

    def work() -> int:
        """Do the work if the main process has found nothing wrong."""
        cfg = setup_config(args.config_file, args.opts, world_size=place.world_size)
        with joined(store, place, torch.device(cfg.MODEL.DEVICE).type, timeout):
            if check is not None and not passed_in_main_process(store, place, check):
                raise SystemExit(1)
            if check is not None:
                check_data(args, cfg)
            main(args)
        return 0

    return _exit_code(work, args, store)


def _spawn(main: Main, args: argparse.Namespace, count: int) -> int:
    """Start the processes of this machine and wait for them."""
    work = functools.partial(_work_in_group, main, args)
    code = spawn(
        work,
        count=count,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        url=args.dist_url,
    )
    if code < 0:
        name = signal.Signals(-code).name
        sys.stderr.write(
            f"error: a process of the run was ended by the signal {name}. If it was SIGKILL, the "
            "machine was perhaps short of memory.\n"
        )
    return abs(code)


def _process_count(args: argparse.Namespace) -> int:
    """Return the number of processes to start on this machine.

    Raises:
        ValueError: the numbers of the command line are not possible.
    """
    count = 1 if args.num_gpus is None else args.num_gpus
    for name, value, least in (
        ("--num-gpus", count, 0),
        ("--num-machines", args.num_machines, 1),
        ("--machine-rank", args.machine_rank, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    if args.machine_rank >= args.num_machines:
        raise ValueError(
            f"--machine-rank is {args.machine_rank}; it must be below --num-machines, which is "
            f"{args.num_machines}."
        )
    return max(count, 1)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise in the main thread meanwhile; elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        """End the run as Ctrl-C does."""
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell_how_to_resume(output_dir: str, command: str) -> None:
    """Log the last checkpoint and the command that resumes from it.

    Args:
        output_dir: of the run; "" if it had not begun.
        command: to type.
    """
    if not output_dir:
        sys.stderr.write("interrupted before the run began\n")
        return
    setup_run_logger(output_dir)
    tag = os.path.join(output_dir, "last_checkpoint")
    last = "there is no checkpoint yet"
    if os.path.isfile(tag):
        with open(tag, encoding="utf-8", errors="replace") as file:
            path = os.path.join(output_dir, file.read().strip())
        if os.path.isfile(path):
            last = f"the last checkpoint is {path}"
    logger.warning("interrupted; %s. To resume:\n%s", last, command)


def resume_command(argv: list[str]) -> str:
    """Return the command line that resumes the run of another one.

    Args:
        argv: script and arguments of the run.
    """
    script, arguments = argv[0], [a for a in argv[1:] if a != "--resume"]
    command = shlex.join([sys.executable, script, "--resume", *arguments])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun ... {shlex.join([script, '--resume', *arguments])}"
    return command
