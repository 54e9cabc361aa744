"""``miti-detr compare``: trains and compares models, or compares existing runs."""

import argparse
import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import fraction, percentage, positive_int, seed_count, split_overrides

if TYPE_CHECKING:
    from miti_detr.study.choose import Choice
    from miti_detr.study.comparison import Comparison
    from miti_detr.study.plan import Study, StudyRun


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "compare",
        help="train and compare models, with a report",
        description="Trains each config with several seeds and writes a report. If it was stopped, "
        "the same command continues.",
        epilog="KEY VALUE pairs at the end override the configs of all arms.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    add = source.add_argument
    add(
        "--config-file", metavar="C", nargs="+", help="YAML of each arm; the first is the reference"
    )
    add("--study", metavar="S", help="study file with arms, budget and groups; see docs/compare.md")
    add(
        "--from",
        dest="runs",
        metavar="RUN",
        nargs="+",
        help="only report on these output folders of runs",
    )
    add = parser.add_argument
    add("--seeds", type=seed_count, help="number of runs per arm, with SEED 0, 1, ... (default 3)")
    add(
        "--iterations",
        type=positive_int,
        help="length of each run; default: from the study or the config",
    )
    add("--evaluations", type=positive_int, help="per run, with --iterations (default 5)")
    add("--jobs", type=positive_int, default=1, help="number of runs at a time (default 1)")
    add(
        "--threads",
        type=positive_int,
        default=1,
        help="per run (default 1, so that results do not depend on --jobs)",
    )
    add("--ap", dest="aps", type=percentage, nargs="+", help="report when these APs are reached")
    add("--threshold", type=fraction, help="lowest score in the pictures (default 0.5)")
    add(
        "--images",
        type=positive_int,
        default=8,
        help="number of images to draw, those that differ most (default 8)",
    )
    add("--output", metavar="DIR", default="output/compare", help="default: output/compare")
    parser.set_defaults(func=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    """Train the runs that are left, then write the report and print its path."""
    from miti_detr.study.comparison import compare_runs
    from miti_detr.study.report import write_report

    output = Path(args.output)
    failures: list[str] = []
    if args.runs:
        words, overrides = split_overrides(args.runs)
        if overrides or args.overrides:
            raise ValueError("--from does not train: remove the KEY VALUE pairs")
        threshold = 0.5 if args.threshold is None else args.threshold
        paths = [Path(word) for word in words]
        comparison = compare_runs(paths, aps=args.aps or (), threshold=threshold)
    else:
        failures, comparison = _train(args, output)
    report = write_report(
        comparison, output, command=_command(), images=args.images, studied=not args.runs
    )
    print(report)
    for failure in failures:
        print(f"miti-detr: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _command() -> str:
    return shlex.join(["miti-detr", *sys.argv[1:]])


def _train(args: argparse.Namespace, output: Path) -> tuple[list[str], "Comparison"]:
    from miti_detr.study.budget import with_iterations
    from miti_detr.study.comparison import compare_study
    from miti_detr.study.plan import plan_runs
    from miti_detr.study.runs import study_lock, time_evaluations

    study, overrides = _study(args)
    choices: list[Choice] = []
    with study_lock(output):
        if study.minutes is not None and study.iterations is None:
            print(f"measuring how many iterations take {study.minutes:g} minutes")
        study = with_iterations(study, output, overrides, threads=args.threads)
        try:
            if study.choose:
                study, choices = _choose(study, output, overrides, args)
            runs = plan_runs(study, output, overrides)
            failures = _run_study(runs, args)
            time_evaluations(runs, lambda run: print(f"timing the evaluation of {run.name}"))
        except KeyboardInterrupt:
            print(f"stopped. To continue, run the same command:\n{_command()}", file=sys.stderr)
            raise
        return failures, compare_study(study, runs, choices)


def _choose(
    study: "Study", output: Path, overrides: list[str], args: argparse.Namespace
) -> tuple["Study", "list[Choice]"]:
    """Train the runs on which the arms choose, and return the study with their choices."""
    from miti_detr.study.choose import choose_values, plan_choosing

    runs = plan_choosing(study, output, overrides)
    print(f"first, {len(runs)} runs on which the arms choose")
    if failures := _run_study(runs, args):
        raise ValueError(
            f"{len(failures)} of the runs on which the arms choose have failed. Correct the cause "
            f"and run the same command again. The first one: {failures[0]}"
        )
    study, choices = choose_values(study, runs, output)
    for choice in choices:
        print(f"{choice.arm}: {choice.key} {choice.value} {choice.remark}".rstrip())
    return study, choices


def _run_study(runs: "list[StudyRun]", args: argparse.Namespace) -> list[str]:
    """Train runs with a progress bar; return the failures."""
    from miti_detr.study.runs import run_study

    progress = _Progress(runs)
    try:
        return run_study(runs, jobs=args.jobs, threads=args.threads, watch=progress.show)
    finally:
        progress.close()


def _study(args: argparse.Namespace) -> tuple["Study", list[str]]:
    """Return the study given by the arguments, and the overrides of all arms."""
    from miti_detr.study.plan import study_of_configs
    from miti_detr.study.study_file import read_study

    if args.study:
        study, overrides = read_study(args.study), args.overrides
    else:
        files, overrides = split_overrides(args.config_file)
        study = study_of_configs(files, seeds=args.seeds or 3)
        overrides = [*overrides, *args.overrides]
    if args.seeds:
        seeds = tuple(range(args.seeds))
        arms = tuple(dataclasses.replace(arm, seeds=seeds) for arm in study.arms)
        study = dataclasses.replace(study, arms=arms)
    names = ("iterations", "evaluations", "threshold", "aps")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(study, **given), overrides


class _Progress:
    """A progress bar over the iterations of all runs, with the active ones.

    Without a terminal, it prints one line per minute.
    """

    def __init__(self, runs: "list[StudyRun]") -> None:
        from tqdm import tqdm

        self._lengths = {run.name: run.iterations for run in runs}
        self._bar = tqdm(
            total=sum(self._lengths.values()),
            unit="it",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 60,
            bar_format="{percentage:3.0f}% {n_fmt}/{total_fmt} it, left {remaining}{postfix}",
        )
        self._started = False

    def show(self, done: dict[str, int], running: list[str]) -> None:
        """Show the progress of all runs."""
        total = sum(done.values())
        if not self._started:  # earlier progress does not count for the speed
            self._started = True
            self._bar.initial = self._bar.n = self._bar.last_print_n = total
            self._bar.start_t = time.time()
        finished = sum(done[name] == length for name, length in self._lengths.items())
        now = ", ".join(f"{name} {done[name]}/{self._lengths[name]}" for name in running)
        self._bar.set_postfix_str(f"{finished}/{len(done)} runs; {now}", refresh=False)
        self._bar.update(total - self._bar.n)

    def close(self) -> None:
        """Leave the last state on the screen and close the bar."""
        self._bar.refresh()
        self._bar.close()
        if not sys.stderr.isatty():
            print(file=sys.stderr)  # the bar leaves its last line open
