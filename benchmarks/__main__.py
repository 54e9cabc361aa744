"""``python -m benchmarks``: measures the runs of ``runs.yaml`` that have no result yet."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from miti_detr.bench.machine import describe_machine

from .runs import RECORD, Run, measure, read_runs, write_run

BUSY = 0.25  # number of cores used by other work above which times are unreliable


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the runs one after the other.

    Returns:
        The exit status: 0, or 1 if a run failed or the list is wrong. A failed run does not stop
        the others.
    """
    args = _parse(argv)
    # Worker processes import torch before they can filter its warnings themselves.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.jit._script")
    try:
        runs = read_runs(args.runs, threads=args.threads)
        _check_names(args.names, runs)
    except (OSError, ValueError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 1
    failed = 0
    for run in runs:
        if args.names and run.name not in args.names:
            continue
        folder = args.output / run.name
        if args.list:
            print(f"{run.name}: {'done' if (folder / RECORD).is_file() else 'to do'}")
        elif (folder / RECORD).is_file():
            print(f"benchmarks: {folder} is complete")
        else:
            failed += not _measure(run, folder)
    return int(failed > 0)


def _measure(run: Run, folder: Path) -> bool:
    """Measure a run and print its table. Returns whether it succeeded."""
    machine = describe_machine()
    print(f"benchmarks: {folder}", flush=True)
    if machine["busy_cores_before"] > BUSY:
        print(f"Other work uses {machine['busy_cores_before']:.1f} cores. Times are unreliable.")
    try:
        found = measure(run)
    except (ValueError, KeyError, OSError, ImportError) as error:
        print(f"benchmarks: error: {folder}: {error}", file=sys.stderr)
        return False
    except RuntimeError:
        traceback.print_exc()
        print(f"benchmarks: error: {folder} failed", file=sys.stderr)
        return False
    write_run(folder, run, machine, found)
    print(f"{found.text}\n", flush=True)
    return True


def _check_names(names: Sequence[str], runs: Sequence[Run]) -> None:
    for name in names:
        if name not in {run.name for run in runs}:
            raise ValueError(f"unknown run {name}. Use --list to see the names")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures the runs of a list one after the other. Runs that have a result are "
        "skipped. Do not run anything else at the same time.",
    )
    add = parser.add_argument
    add("names", metavar="RUN", nargs="*", help="names of runs; default: all")
    add("--runs", type=Path, default=Path(__file__).with_name("runs.yaml"), metavar="YAML")
    add("--output", type=Path, default=Path("output/bench"), metavar="DIR")
    add("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    add("--list", action="store_true", help="list the runs and stop")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
