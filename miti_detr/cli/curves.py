"""``miti-detr curves``: draws loss, AP and AR of one or several runs."""

import argparse
from pathlib import Path


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "curves",
        help="draw loss, AP and AR of runs",
        description="Draws metrics.json of one or several Detectron2 runs into one picture.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder, or its metrics.json")
    parser.add_argument(
        "--output",
        metavar="PNG",
        help="default: curves.png in the run, or in this folder for several runs",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and print the path of the picture."""
    from miti_detr.visualize.curves import draw_curves, read_run, run_names

    paths = [Path(path) for path in args.runs]
    runs = [read_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]
    single = paths[0] if len(paths) == 1 else Path()
    output = Path(args.output or (single if single.is_dir() else single.parent) / "curves.png")
    draw_curves(runs, output)
    print(output)
    return 0
