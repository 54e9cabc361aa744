"""Runs pieces of code in processes that have imported torch and Detectron2, but not this package.

A program: reads jobs as JSON from standard input, writes their results as JSON to standard output.
The imports, which take seconds, happen once; each step of a job runs in a fork of this process, so
it sees nothing that another step has imported or registered.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import traceback
from typing import Any

import torch

PRELOADED = (
    *("detectron2.data", "detectron2.engine", "detectron2.evaluation", "detectron2.model_zoo"),
    *("detectron2.modeling", "matplotlib.pyplot", "scipy.optimize", "torch.optim"),
)


def main() -> None:
    """Run all jobs. A job ends at its first step that fails."""
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # so that a fork does not copy the memory of all objects
    assert not any(name.split(".")[0] == "miti_detr" for name in sys.modules)
    results = {job["name"]: _run_job(job) for job in json.load(sys.stdin)}
    json.dump(results, sys.stdout)


def _run_job(job: dict[str, Any]) -> str:
    """Run the steps of a job in its folder. Returns "", or the output of the step that failed."""
    for step in job["steps"]:
        with tempfile.TemporaryFile() as log:
            child = os.fork()
            if child == 0:
                os._exit(_run_step(step, job["folder"], log.fileno()))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status != 0:
                log.seek(0)
                output = log.read().decode(errors="replace")
                return f"exit status {status}\n{output[-4000:]}"
    return ""


def _run_step(step: dict[str, Any], folder: str, log: int) -> int:
    """Execute the parts of a step in one namespace, in this process; returns its exit status."""
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder)
    sys.argv = step.get("argv", ["snippet"])
    namespace: dict[str, Any] = {"__name__": step.get("module", "snippet")}
    try:
        for part in step["parts"]:
            lines = "\n" * (part["line"] - 1)  # so that a traceback names the line of the page
            exec(compile(lines + part["text"], part["file"], "exec"), namespace)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()
