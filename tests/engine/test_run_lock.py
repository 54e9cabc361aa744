import subprocess
import sys
from pathlib import Path

import pytest

from miti_detr.engine.launch.run_lock import run_lock

HOLD = """
import sys
from miti_detr.engine.launch.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_the_lock_of_another_process(tmp_path: Path) -> None:
    """It names the folder and the process, and the system releases it after SIGKILL."""
    with run_lock(str(tmp_path)):
        pass
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(BlockingIOError, match=f"{tmp_path} is in use by process {other.pid} on"),
            run_lock(str(tmp_path)),
        ):
            pass
        other.kill()
        with run_lock(str(tmp_path), patience=10):
            pass
