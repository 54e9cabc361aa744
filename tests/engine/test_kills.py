import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_killed_run_equals_one_that_ran_through() -> None:
    """``MITI_DETR_KILLS`` sets how often a run is killed, at random moments."""
    kills = os.environ.get("MITI_DETR_KILLS", "3")
    command = [sys.executable, "-m", "tests.engine.kills", "--kills", kills]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert f"{kills} kills" in run.stdout
