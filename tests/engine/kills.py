"""Kills a small run at random moments, resumes it, and compares it with one that ran through.

``python -m tests.engine.kills --kills 20 --seed 1`` prints what was killed and ends with 0 if
weights, optimizer, best weights and ``metrics.json`` (except for times) are identical.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from miti_detr.engine import run
from miti_detr.engine.launch.processes import die_with_parent
from tests.engine import stub

TIMES = {"time", "data_time", "eta_seconds", "rank_data_time"}
CHANGES = {
    "SOLVER__MAX_ITER": 70,
    "SOLVER__STEPS": (50,),
    "SOLVER__CHECKPOINT_PERIOD": 15,
    "SOLVER__ACCUMULATE": 2,
    "SOLVER__EARLY_STOP__PATIENCE": 10,  # ends the run at iteration 54
    "SOLVER__EARLY_STOP__MIN_DELTA": 100,
    "SOLVER__EMA__ENABLED": True,
    "SOLVER__EMA__DECAY": 0.9,
    "SOLVER__EMA__WARMUP": 20,
    "SOLVER__EMA__PERIOD": 2,
    "MODEL__DETR__DROPOUT": 0.2,
    "DATASETS__TEST": ("tiny_val",),
    "TEST__EVAL_PERIOD": 5,
}


def start(data: Path, folder: Path) -> int:
    """Start or resume the run in a forked process, and return the id of that process."""
    pid = os.fork()
    if pid:
        return pid
    die_with_parent()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    values = {"config_file": "", "num_gpus": 1, "num_machines": 1, "machine_rank": 0}
    values |= {"dist_url": "auto", "resume": True, "eval_only": False}
    options = stub.options(data, folder, **CHANGES)
    code = 1
    try:
        code = run(stub.main, argparse.Namespace(**values, opts=options))
    finally:
        os._exit(code)


def finish(pid: int) -> None:
    """Wait for a run to end by itself."""
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a run ended with {os.waitstatus_to_exitcode(status)}")


def is_killed(pid: int, delay: float) -> bool:
    """Kill a run after a delay, unless it has ended by then."""
    time.sleep(delay)
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
        if status:
            raise RuntimeError(f"a run ended with {os.waitstatus_to_exitcode(status)}")
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.json`` without times."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """A checkpoint without what differs by time and folder."""
    content = torch.load(folder / name, weights_only=True)
    content.pop("miti_detr", None)
    content.get("trainer", {}).pop("history", None)
    return content


def differences(left: Any, right: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [x for key in left for x in differences(left[key], right[key], f"{place}.{key}")]
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return [] if torch.equal(left, right) else [place]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        pairs = zip(left, right, strict=True)
        return [x for i, pair in enumerate(pairs) for x in differences(*pair, f"{place}.{i}")]
    return [] if left == right else [f"{place}: {left} {right}"]


def assert_same(folder: Path, reference: Path) -> None:
    """Compare two runs to the bit."""
    for name in ("model_final.pth", "model_best.pth"):
        left, right = checkpoint(folder, name), checkpoint(reference, name)
        assert differences(left, right) == [], name
    assert json.dumps(records(folder)) == json.dumps(records(reference))  # NaN is equal to NaN
    assert not list(folder.glob("*.incomplete"))


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Kill as often as asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        stub.write_data(root / "data")
        begin = time.monotonic()
        finish(start(root / "data", root / "reference"))
        whole = time.monotonic() - begin
        assert "stopped early after iteration 54" in (root / "reference.log").read_text()
        kills, series = 0, 0
        while kills < args.kills:
            folder = root / f"killed{series}"
            series += 1
            while kills < args.kills and is_killed(
                start(root / "data", folder), draw.uniform(0.1, 0.7) * whole
            ):
                kills += 1
                tag = folder / "last_checkpoint"
                done = tag.read_text() if tag.exists() else "nothing"
                say(f"kill {kills}: {done} is written")
            finish(start(root / "data", folder))
            try:
                assert_same(folder, root / "reference")
            except AssertionError:
                say(folder.with_suffix(".log").read_text()[-3000:])
                raise
        say(f"{kills} kills, {series} runs, each equal to the reference ({whole:.1f} s)")


if __name__ == "__main__":
    sys.exit(main())
