"""``miti-detr predict``: detects objects in images and films, and writes pictures and results."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from .arguments import add_model_arguments, fraction, positive_int, split_overrides

SOME_FAILED = 3  # exit status
SHOWN = 20  # failures that are printed


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "predict",
        help="detect objects in images and films",
        description="Writes a picture with boxes and masks for each image, a film for each film, "
        "and one file of results. Stopped at any time, the same command continues. Pictures under "
        "320 pixels are enlarged; results use the pixels of the image. The exit status is 0 if all "
        "files were predicted, 3 if some failed, 1 if all failed.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FILM|FOLDER|PATTERN|-",
        help="quoted patterns such as 'photos/**/*.jpg' search sub-folders; - reads paths from "
        "standard input",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for all results")
    parser.add_argument(
        "--format",
        default="coco",
        choices=("coco", "csv", "yolo", "jsonl"),
        help="of the results (default coco: predictions.json)",
    )
    parser.add_argument(
        "--no-pictures", action="store_true", help="write results only, no pictures and films"
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        help="lowest score; default: recorded with the model, else 0.5",
    )
    parser.add_argument("--top-k", type=positive_int, metavar="K", help="detections per image")
    parser.add_argument(
        "--classes", metavar="NAME,NAME", help="detect these classes only; default: all"
    )
    parser.add_argument(
        "--tile", type=positive_int, metavar="PIXELS", help="search tiles of larger images, too"
    )
    parser.add_argument(
        "--overlap", type=fraction, default=0.2, help="shared part of a tile (default 0.2)"
    )
    parser.add_argument(
        "--tta", action="store_true", help="merge the detections of the views of TEST.AUG"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=4, help="images per forward pass (default 4)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: as the model says")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="of a checkpoint; default: as its config says",
    )
    add_model_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Predict; the exit status says whether files failed."""
    from tqdm import tqdm

    from miti_detr.predict import load_predictor
    from miti_detr.predict.job import ERRORS, predict_files
    from miti_detr.predict.load import is_exported
    from miti_detr.predict.sources import find_images

    words, overrides = split_overrides(args.images)
    files = find_images(words, films=True)
    names = ("threshold", "top_k", "tile", "overlap", "tta", "precision", "config_file")
    options = {
        **{name: getattr(args, name) for name in names},
        "classes": args.classes.split(",") if args.classes else None,
        "overrides": [*overrides, *args.overrides],
    }
    if not is_exported(args.weights):
        from miti_detr.engine import prepare_cpu

        prepare_cpu()
    predictor = load_predictor(
        args.weights, device=args.device, batch_size=args.batch_size, **options
    )
    print(f"miti-detr: {predictor}", file=sys.stderr)
    start = time.perf_counter()
    # disable=None hides the bar unless standard error is a terminal.
    with tqdm(total=len(files), unit="file", disable=None) as bar:
        summary = predict_files(
            predictor,
            files,
            Path(args.output),
            format=args.format,
            draw=not args.no_pictures,
            settings={"weights": _identity(args.weights), **options},
            advance=bar.update,
        )
    done = summary.done - summary.resumed
    speed = f", {done / (time.perf_counter() - start):.1f} images/s" if done else ""
    for file, reason in summary.failed[:SHOWN]:
        print(f"miti-detr: skipped {file}: {reason}", file=sys.stderr)
    if len(summary.failed) > SHOWN:
        print(
            f"miti-detr: {len(summary.failed)} failed, see {args.output}/{ERRORS}", file=sys.stderr
        )
    resumed = f", {summary.resumed} of them before" if summary.resumed else ""
    print(
        f"{summary.done} of {len(files)} images{resumed}, {summary.detections} detections with "
        f"score >= {predictor.threshold:g}{speed} -> {summary.output}"
    )
    if summary.failed:
        return SOME_FAILED if summary.done else 1
    return 0


def _identity(weights: str) -> list[Any]:
    """What tells a file of weights from another one; [] for an address."""
    if not os.path.exists(weights):
        return [weights]
    state = os.stat(weights)
    return [os.path.abspath(weights), state.st_size, state.st_mtime_ns]
