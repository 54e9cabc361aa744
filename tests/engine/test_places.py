"""The environments of torchrun and SLURM, and real processes that are stopped or orphaned."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from miti_detr.engine import add_run_arguments, run
from miti_detr.engine.launch.processes import Place, place_from_environment
from tests.engine import stub

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize("num_gpus", [None, 2])
def test_place_of_torchrun(num_gpus: int | None) -> None:
    assert place_from_environment(TORCHRUN, num_gpus=num_gpus) == Place(1, 2, 1)
    for environment in ({}, {"WORLD_SIZE": "1"}):
        assert place_from_environment(environment, num_gpus=num_gpus) is None


SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}


def test_place_of_srun() -> None:
    assert place_from_environment(SLURM, num_gpus=None) == Place(3, 4, 1)
    assert place_from_environment({**SLURM, **TORCHRUN}, num_gpus=None) == Place(1, 2, 1)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(ValueError, match=r"4 processes.* is not set.* export MASTER_ADDR="):
            place_from_environment({**SLURM, name: ""}, num_gpus=None)
    with pytest.raises(ValueError, match="RANK is not set"):
        place_from_environment({**SLURM, "SLURM_PROCID": ""}, num_gpus=None)


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_ID": ""},  # the batch script itself
        {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell in a job of several tasks
    ],
)
def test_slurm_with_one_process(changes: dict[str, str]) -> None:
    environment = {**SLURM, "MASTER_ADDR": "", **changes}
    assert place_from_environment(environment, num_gpus=2) is None


def test_the_command_line_comes_before_slurm() -> None:
    """One task of SLURM for each machine, which starts the processes of that machine."""
    assert place_from_environment(SLURM, num_gpus=8, num_machines=4) is None


@pytest.mark.parametrize(
    ("changes", "num_gpus", "message"),
    [
        ({"MASTER_PORT": ""}, None, "MASTER_PORT is not set"),
        ({"RANK": "2"}, None, "RANK 2 is not below WORLD_SIZE 2"),
        ({"RANK": "one"}, None, "RANK is 'one'"),
        ({}, 4, "--num-gpus 4 contradicts the environment"),
    ],
)
def test_contradictions(changes: dict[str, str], num_gpus: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_from_environment({**TORCHRUN, **changes}, num_gpus=num_gpus)


def _launch(opts: list[str], output: Path) -> None:
    """Run in two processes, as a program of its own would."""
    output.mkdir()
    os.dup2(os.open(output / "errors.txt", os.O_WRONLY | os.O_CREAT), 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    parser = default_argument_parser()
    add_run_arguments(parser)
    arguments = ["--num-gpus", "2", "--timeout", "0.05", *opts]
    os._exit(run(stub.main, parser.parse_args(arguments)))


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def _running(data: Path, output: Path) -> Iterator[tuple[BaseProcess, list[int], list[int]]]:
    """The launcher of a run that has written a checkpoint, its ranks, and their workers."""
    changes = {"SOLVER__MAX_ITER": 10**6, "SOLVER__CHECKPOINT_PERIOD": 5}
    options = stub.options(data, output, **changes, DATALOADER__NUM_WORKERS=1)
    # a fork, because another program would import torch and Detectron2 once more
    launcher = multiprocessing.get_context("fork").Process(target=_launch, args=(options, output))
    launcher.start()
    try:
        assert launcher.pid is not None
        _wait_for(output / "model_0000004.pth")
        ranks = [pid for pid in _children(launcher.pid) if "spawn_main" in _command(pid)]
        workers = [child for pid in ranks for child in _children(pid)]
        assert (len(ranks), len(workers)) == (2, 2)
        yield launcher, ranks, workers
    finally:
        launcher.kill()
        launcher.join()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_process_ends_the_run_and_a_killed_launcher_all(
    tiny_data: Path, tmp_path: Path
) -> None:
    """SIGSTOP of rank 1 is reported with its rank; SIGKILL of the launcher leaves no process."""
    stopped, orphaned = tmp_path / "stopped", tmp_path / "orphaned"
    with _running(tiny_data, orphaned) as (launcher, ranks, workers):
        pass  # the launcher is killed
    with _running(tiny_data, stopped) as (launcher, more_ranks, more_workers):
        os.kill(more_ranks[1], signal.SIGSTOP)
        launcher.join(120)
        assert launcher.exitcode == 1
        error = (stopped / "errors.txt").read_text()
        assert f"error: rank 1 (process {more_ranks[1]} on" in error
        assert "Traceback" not in error, error[-3000:]
    deadline = time.monotonic() + 60
    while any(map(_command, [*ranks, *workers, *more_ranks, *more_workers])):
        assert time.monotonic() < deadline
        time.sleep(0.05)
