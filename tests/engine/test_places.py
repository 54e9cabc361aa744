"""The environment of torchrun, and real processes that are stopped or orphaned."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


RUN = """
import sys
from detectron2.engine import default_argument_parser
from miti_detr.engine import add_run_arguments, run
from tests.engine import stub
if __name__ == "__main__":
    parser = default_argument_parser()
    add_run_arguments(parser)
    sys.exit(run(stub.main, parser.parse_args()))
"""


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_process_ends_the_run_and_a_killed_launcher_all(
    tiny_data: Path, tmp_path: Path
) -> None:
    """SIGSTOP of rank 1 is reported with its rank; SIGKILL of the launcher leaves no process."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": ""}
    for case in ("stopped", "orphaned"):
        output = tmp_path / case
        changes = {"SOLVER__MAX_ITER": 10**6, "SOLVER__CHECKPOINT_PERIOD": 5}
        options = stub.options(tiny_data, output, **changes, DATALOADER__NUM_WORKERS=1)
        command = [sys.executable, str(script), "--num-gpus", "2", "--timeout", "0.05", *options]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as launcher:
            try:
                _wait_for(output / "model_0000004.pth")
                ranks = [pid for pid in _children(launcher.pid) if "spawn_main" in _command(pid)]
                workers = [child for pid in ranks for child in _children(pid)]
                assert (len(ranks), len(workers)) == (2, 2)
                if case == "stopped":
                    os.kill(ranks[1], signal.SIGSTOP)
                    _, error = launcher.communicate(timeout=120)
                    assert launcher.returncode == 1
                    assert f"error: rank 1 (process {ranks[1]} on" in error
                    assert "Traceback" not in error, error[-3000:]
                else:
                    launcher.kill()
                    launcher.wait()
            finally:
                launcher.kill()
            deadline = time.monotonic() + 60
            while any(map(_command, [*ranks, *workers])):
                assert time.monotonic() < deadline
                time.sleep(0.05)
