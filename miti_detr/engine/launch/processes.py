"""The processes of a run: started here, or by ``torchrun`` or SLURM, and none left behind."""

import contextlib
import ctypes
import datetime
import multiprocessing
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.utils import comm
from torch import distributed

from .heartbeat import Heartbeat

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Loaded once: in a process that was forked from several threads, loading could wait for ever
_libc = ctypes.CDLL(None) if platform.system() == "Linux" else None
_ENDING = 5.0  # seconds that a process is given to end by itself


@dataclass(frozen=True)
class Place:
    """The place of one process in a run of several.

    Attributes:
        rank: among all processes of the run.
        world_size: how many these are.
        local_rank: among the processes of this machine.
        address: host and port of the store through which the processes find each other; None: the
            environment describes it (``MASTER_ADDR``, ``MASTER_PORT``).
    """

    rank: int
    world_size: int
    local_rank: int
    address: tuple[str, int] | None = None


def place_from_environment(
    environment: Mapping[str, str], *, num_gpus: int | None, num_machines: int = 1
) -> Place | None:
    """Read the place of this process from the variables of ``torchrun`` or of SLURM's ``srun``.

    SLURM's variables are read only in a step of several tasks, and only if neither ``torchrun`` nor
    the command line describes the run. The batch script exports ``MASTER_ADDR`` and
    ``MASTER_PORT``.

    Args:
        environment: such as ``os.environ``.
        num_gpus: number of processes of each machine on the command line; None: not given.
        num_machines: of the command line.

    Returns:
        None if this process was not started as one of several.

    Raises:
        ValueError: the variables are incomplete or contradict each other or the command line.
    """
    if num_machines == 1:
        environment = _with_names_of_torchrun(environment)
    if not environment.get("RANK") and environment.get("WORLD_SIZE", "1") in ("", "1"):
        return None
    numbers = {}
    for name in _VARIABLES:
        value = environment.get(name, "")
        if not value:
            raise ValueError(
                f"the environment describes a run of several processes, but {name} is not set. Set "
                f"{', '.join(_VARIABLES)}, as torchrun does, or unset them all."
            )
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise ValueError(f"the environment variable {name} is {value!r}; it must be a number.")
        numbers[name] = int(value) if value.isdecimal() else 0
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= world_size:
        raise ValueError(f"RANK {rank} is not below WORLD_SIZE {world_size} in the environment.")
    local = environment.get("LOCAL_WORLD_SIZE", "")
    per_machine = int(local) if local.isdecimal() and num_machines == 1 else world_size
    if num_gpus is not None and num_gpus * num_machines != per_machine:
        raise ValueError(
            f"--num-gpus {num_gpus} contradicts the environment, in which torchrun or SLURM has "
            f"started {per_machine} processes. Leave --num-gpus away."
        )
    return Place(rank, world_size, numbers["LOCAL_RANK"]) if world_size > 1 else None


def _with_names_of_torchrun(environment: Mapping[str, str]) -> Mapping[str, str]:
    """Add the variables of ``torchrun`` in a process that ``srun`` has started.

    Raises:
        ValueError: the address or port of the main process is not set.
    """
    # In an interactive shell, which is a step too, SLURM_NTASKS counts the tasks of the whole job.
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    in_step = environment.get("SLURM_STEP_ID") and tasks != "1"
    if not in_step or environment.get("RANK") or environment.get("WORLD_SIZE"):
        return environment
    if not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise ValueError(
            f"srun has started {tasks} processes, but MASTER_ADDR or MASTER_PORT is not set. In "
            "the batch script: export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | "
            "head -n 1) MASTER_PORT=29500"
        )
    rank, local_rank = (environment.get(f"SLURM_{name}", "") for name in ("PROCID", "LOCALID"))
    return {**environment, "RANK": rank, "WORLD_SIZE": tasks, "LOCAL_RANK": local_rank}


def connect(place: Place, timeout: float) -> distributed.Store:
    """Connect to the store that all processes of a run share.

    Args:
        place: of this process.
        timeout: seconds to wait for an answer.
    """
    limit = datetime.timedelta(seconds=timeout)
    if place.address is not None:
        return distributed.TCPStore(*place.address, place.world_size, False, limit)
    return next(distributed.rendezvous("env://", place.rank, place.world_size, timeout=limit))[0]


@contextlib.contextmanager
def joined(store: distributed.Store, place: Place, device: str, timeout: float) -> Iterator[None]:
    """Make this process a member of the process group of its run.

    Args:
        store: of :func:`connect`.
        place: of this process.
        device: type of the device that it computes on; ``cuda`` communicates through NCCL.
        timeout: seconds after which a process that does not answer ends the run.

    Raises:
        ValueError: the machine has fewer GPUs than processes.
    """
    if device == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {place.local_rank} of this machine has no GPU, because there are only "
                f"{torch.cuda.device_count()}. Start fewer processes, or set MODEL.DEVICE cpu."
            )
        torch.cuda.set_device(place.local_rank)
    with Heartbeat(store, place.rank, place.world_size, timeout):
        # Three times as long: a stopped process is noticed by its missing heartbeat, and others may
        # wait for the main process to finish an evaluation.
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=distributed.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=datetime.timedelta(seconds=3 * timeout),
        )
        comm.create_local_process_group(_processes_per_machine(store, place))
        comm.synchronize()
        yield
        comm.synchronize()
    distributed.destroy_process_group()


def passed_in_main_process(
    store: distributed.Store, place: Place, check: Callable[[], None]
) -> bool:
    """Call a check in the main process, while the others wait for its outcome.

    Args:
        store: of :func:`connect`.
        place: of this process.
        check: raises if it fails.

    Returns:
        Whether it has passed; False only in the other processes.
    """
    if place.rank > 0:
        store.wait(["checked"], datetime.timedelta(days=1))
        return store.get("checked") == b"passed"
    outcome = "failed"
    try:
        check()
        outcome = "passed"
    finally:
        store.set("checked", outcome)
    return True


def _processes_per_machine(store: distributed.Store, place: Place) -> int:
    store.set(f"local_rank/{place.rank}", str(place.local_rank))
    keys = [f"local_rank/{rank}" for rank in range(place.world_size)]
    return 1 + max(int(store.get(key)) for key in keys)


def spawn(
    work: Callable[..., Any],
    *,
    count: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    url: str = "auto",
) -> int:
    """Start processes, and wait until all have ended.

    When one fails, the others are stopped. They die with this process, in whatever way it ends.

    Args:
        work: called with its :class:`Place` in each process; can be pickled.
        count: processes on this machine.
        num_machines: of the run.
        machine_rank: of this machine, from 0.
        url: ``tcp://host:port`` of machine 0; ``auto``: any free port, for one machine.

    Returns:
        0, or the exit code of the first process that failed: negative for a signal.

    Raises:
        ValueError: ``url`` is not possible.
        OSError: the port is taken.
    """
    host, port = _address(url, num_machines)
    world_size = count * num_machines
    # Kept in this process, so that the store outlives every process of the run.
    store = distributed.TCPStore(host, port, world_size, machine_rank == 0, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = []
    try:
        for local_rank in range(count):
            rank = machine_rank * count + local_rank
            place = Place(rank, world_size, local_rank, (host, store.port))
            process = context.Process(target=_child, args=(work, place, os.getpid()))
            process.start()
            processes.append(process)
        while True:
            codes = [process.exitcode for process in processes]  # read once: they change meanwhile
            if failed := [code for code in codes if code]:
                return failed[0]
            running = [p.sentinel for p, code in zip(processes, codes, strict=True) if code is None]
            if not running:
                return 0
            wait(running)
    finally:
        _stop(processes)


def _address(url: str, num_machines: int) -> tuple[str, int]:
    if url == "auto" and num_machines == 1:
        return "127.0.0.1", 0
    parsed = urlparse(url)
    if parsed.scheme != "tcp" or not parsed.hostname or not parsed.port:
        raise ValueError(
            f"--dist-url is {url!r}; a run on {num_machines} machines needs the address of the "
            "first one, as tcp://HOST:PORT."
        )
    return parsed.hostname, parsed.port


def _child(work: Callable[[Place], int], place: Place, parent: int) -> None:
    """Run in a started process."""
    die_with_parent(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with forks_die_with_parent():
            code = work(place)
    except KeyboardInterrupt:  # Ctrl-C reaches the parent, too, which reports it
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _stop(processes: list[BaseProcess]) -> None:
    """End processes: by themselves, else by a signal."""
    for process in processes:
        process.join(_ENDING)
        if process.exitcode is None:
            for child in _children(process.pid):  # else they report that their parent is lost
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            process.kill()  # a stopped process does not see SIGTERM
            process.join()


def _children(pid: int | None) -> list[int]:
    """Ids of the processes that the main thread of a process has started; only on Linux."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def die_with_parent(parent: int | None = None) -> None:
    """Let the system kill this process when its parent ends; only on Linux.

    Args:
        parent: id of the parent, to notice that it has already ended; None: not known.
    """
    if _libc is None:
        return
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@contextlib.contextmanager
def forks_die_with_parent() -> Iterator[None]:
    """Apply :func:`die_with_parent` to the processes that are forked meanwhile: data loaders'."""
    global _forks_die
    before, _forks_die = _forks_die, True
    try:
        yield
    finally:
        _forks_die = before


_forks_die = False


def _after_fork() -> None:
    if _forks_die:
        die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of a run is not for its workers


os.register_at_fork(after_in_child=_after_fork)
