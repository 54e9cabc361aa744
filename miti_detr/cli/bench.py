"""``miti-detr bench``: time, memory and size of a model, alone or against another one."""

import argparse
import os
from pathlib import Path

from benchmarks import PRECISIONS, SIDES, TASKS, VARIABLES

from .arguments import natural_int, positive_int, split_overrides

# Arguments that are named as in BenchSpec and BenchRequest
SETTINGS = ("batch", "sizes", "precision", "objects", "repeats", "threads")
CHOICES = ("tasks", "against", "images", "grow", "limit", "paper")
BUSY = 0.25  # cores that other work takes, from which on times mean little


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure time, memory and size of a model",
        description="Measures the model of a config on random images, each side in a process of "
        "its own. Let nothing else run meanwhile.",
        epilog="KEY VALUE pairs at the end override the config, such as MODEL.DEVICE cpu.",
    )
    add = parser.add_argument
    add("--config-file", metavar="C", nargs="+", required=True, help="YAML; several with --paper")
    add("--batch", type=positive_int, default=2, help="images per step (default 2)")
    add(
        "--size",
        dest="sizes",
        type=_sizes,
        default="512x672",
        metavar="HxW,...",
        help="of the images in turn, in pixels (default 512x672)",
    )
    add("--precision", default="float32", choices=PRECISIONS)
    add("--objects", type=natural_int, default=20, help="per image, in training (default 20)")
    add("--repeats", type=positive_int, default=7, help="measured steps (default 7)")
    add("--threads", type=positive_int, default=os.cpu_count(), help="default: all cores")
    add(
        "--only",
        dest="tasks",
        type=_tasks,
        metavar="A,B",
        help=f"of {', '.join(TASKS)}; default: all",
    )
    add(
        "--against",
        choices=SIDES[1:],
        help="measure in turn with the same model without the layer residual, the plain path of "
        "2020, or Hugging Face's DETR",
    )
    add("--images", type=positive_int, default=500, help="of the evaluation (default 500)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--grow",
        choices=VARIABLES,
        help="how the cost of encoder and decoder (objects: set loss) grows; with --only training "
        "forward and backward",
    )
    mode.add_argument(
        "--limit", action="store_true", help="training step against the machine's own rates"
    )
    mode.add_argument("--paper", action="store_true", help="Table 2 of the paper")
    add("--output", metavar="DIR", help="write bench.json and a chart there")
    parser.set_defaults(func=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    """Measure, print each table when it is there, write the record."""
    from benchmarks.meters import describe_machine
    from benchmarks.run import BenchRequest, run_benchmark, write_record
    from benchmarks.spec import BenchSpec

    files, overrides = split_overrides(args.config_file)
    settings = {name: getattr(args, name) for name in SETTINGS}
    specs = tuple(BenchSpec(file, (*overrides, *args.overrides), **settings) for file in files)
    request = BenchRequest(specs, **{name: getattr(args, name) for name in CHOICES})
    measurements = run_benchmark(request)
    # New processes import torch before they can be told to be quiet.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.jit._script")
    about = describe_machine()
    print(
        f"{about['processor']}, {about['cores']} cores, {args.threads} threads, torch "
        f"{about['versions']['torch']}, {args.precision}"
    )
    busy = about["busy_cores_before"]
    if busy > BUSY:
        print(f"Other work keeps {busy:.1f} cores busy: do not trust these times.")
    results = {}
    for name, result, text in measurements:
        print(f"\n{text}", flush=True)
        results[name] = result
    if args.output:
        for path in write_record(Path(args.output), request, about, results):
            print(path)
    return 0


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Read ``512x672,480x640``."""
    sizes = []
    for word in text.split(","):
        height, _, width = word.partition("x")
        if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
            raise argparse.ArgumentTypeError(f"{word!r} is no height x width such as 512x672")
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def _tasks(text: str) -> tuple[str, ...]:
    """Read ``inference,training``."""
    tasks = tuple(text.split(","))
    for task in tasks:
        if task not in TASKS:
            raise argparse.ArgumentTypeError(f"{task!r} is not one of {', '.join(TASKS)}")
    return tasks
