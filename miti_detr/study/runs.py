"""Runs the trainings of a study in processes, and resumes those that were stopped."""

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from miti_detr.bench.evaluation import time_evaluation
from miti_detr.files import write_text

from .plan import StudyRun
from .run import FINISHED_FILE

EVALUATION_FILE = "evaluation.json"
CONSOLE_FILE = "console.txt"
_POLL = 0.5  # seconds between two checks of the runs
_TAIL = 65536  # number of bytes at the end of metrics.json that contain its last line

Watch = Callable[[dict[str, int], list[str]], None]


@contextlib.contextmanager
def study_lock(output: Path) -> Iterator[None]:
    """Lock a folder, so that one study at a time works in it.

    Raises:
        ValueError: another study holds the lock.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another comparison is running in {output}. Wait for it or choose another --output"
            ) from error
        yield


def run_study(
    runs: Sequence[StudyRun], *, jobs: int = 1, threads: int = 1, watch: Watch
) -> list[str]:
    """Train the runs that have not finished.

    Args:
        runs: runs, in the order in which they start; one that starts from the weights of another
            run starts after it.
        jobs: number of processes at a time.
        threads: number of torch threads per process.
        watch: called about twice a second with the number of iterations that each run has done and
            the names of the active runs.

    Returns:
        A message for each run that ended without a result.
    """
    waiting = [run for run in runs if not is_finished(run)]
    running: dict[str, tuple[StudyRun, subprocess.Popen[bytes]]] = {}
    failures: list[str] = []
    try:
        while waiting or running:
            for run in [run for run in waiting if all(map(Path.is_file, run.starts))]:
                if len(running) < jobs:
                    waiting.remove(run)
                    running[run.name] = (run, _start(run, threads))
            if not running:  # what the others start from will not come
                return failures + [
                    f"{run.name} has nothing to start from: there is no {run.starts[0]}"
                    for run in waiting
                ]
            time.sleep(_POLL)
            for name, (run, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if not is_finished(run):
                        failures.append(_failure(run, process.returncode))
            watch({run.name: iterations_done(run) for run in runs}, list(running))
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    return failures


def time_evaluations(runs: Sequence[StudyRun], watch: Callable[[StudyRun], None]) -> None:
    """Time the evaluation of the final weights of finished runs, one after the other.

    Writes ``evaluation.json`` for each; an existing file is not measured again.

    Args:
        runs: runs, in order. The first one is evaluated twice, because the first evaluation of a
            process also pays for its start.
        watch: called before each evaluation.
    """
    left = [
        run
        for run in runs
        if (run.path / "model_final.pth").is_file() and not (run.path / EVALUATION_FILE).is_file()
    ]
    for index, run in enumerate([*left[:1], *left]):
        watch(run)
        row = time_evaluation(run.arm.config_file, run.options)
        if index > 0:
            text = json.dumps({**dataclasses.asdict(row), "cores": os.cpu_count()})
            write_text(run.path / EVALUATION_FILE, text)


def is_finished(run: StudyRun) -> bool:
    """Return whether a run has finished."""
    return (run.path / FINISHED_FILE).is_file()


def iterations_done(run: StudyRun) -> int:
    """Return how many iterations a run has done, by the last record of its ``metrics.json``."""
    if is_finished(run):
        return run.iterations
    try:
        with (run.path / "metrics.json").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines()
        return min(int(json.loads(lines[-1])["iteration"]) + 1, run.iterations)
    except (OSError, ValueError, IndexError, KeyError):  # not started, or a line is being written
        return 0


def _start(run: StudyRun, threads: int) -> subprocess.Popen[bytes]:
    run.path.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "miti_detr.study.run"]
    arguments = ["--config-file", run.arm.config_file]
    if run.rank_period is not None:
        arguments += ["--rank-period", str(run.rank_period)]
    arguments += run.options
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning"),
        # The same package as in this process, whatever folder it was started from.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    with (run.path / CONSOLE_FILE).open("ab") as console:
        return subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches only this process, which stops the others
        )


def _failure(run: StudyRun, status: int) -> str:
    console = run.path / CONSOLE_FILE
    lines = console.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1].strip() if lines else "no output"
    return f"{run.name} ended with status {status}: {last} (see {console})"
