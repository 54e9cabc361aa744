"""``miti-detr report``: accuracy, thresholds, calibration and errors of a model, as one page."""

import argparse
import shlex
import sys
from pathlib import Path

from .arguments import positive_int


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "report",
        help="report where a model fails and which threshold to take",
        description="Evaluates a model on a data set and writes one page with its accuracy, "
        "thresholds, calibration, kinds of errors and worst images, and the same as JSON and CSV.",
        epilog="KEY VALUE pairs at the end override the config, such as MODEL.DEVICE cpu.",
    )
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="checkpoint or exported model")
    add("dataset", metavar="DATASET", help="registered name, or JSON file in COCO format")
    add("--images", metavar="DIR", help="images of a JSON file; default: its folder")
    add("--against", metavar="W", help="other model, for the difference of AP with its interval")
    add("--output", metavar="DIR", default="output/report", help="default: output/report")
    add(
        "--store-threshold",
        action="store_true",
        help="write the chosen threshold into the checkpoint, for predict",
    )
    add(
        "--pictures",
        type=positive_int,
        default=12,
        metavar="N",
        help="number of images to draw, those with most errors (default 12)",
    )
    add(
        "--resamples",
        type=positive_int,
        default=1000,
        metavar="N",
        help="number of resamples for intervals (default 1000)",
    )
    add("--batch-size", type=positive_int, default=4, help="images per forward pass (default 4)")
    add("--config-file", metavar="C", help="YAML file; default: the config in the checkpoint")
    parser.set_defaults(func=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    """Write the report; print AP, the threshold and the path of the page."""
    from tqdm import tqdm

    from miti_detr.engine import prepare_cpu
    from miti_detr.predict import load_predictor
    from miti_detr.report import ReportOptions, read_truth, report_model
    from miti_detr.report.store import check_can_store, store_threshold

    prepare_cpu()
    if args.store_threshold:
        check_can_store(args.weights)
    files = [args.weights, *([args.against] if args.against else [])]
    predictors = [
        load_predictor(
            file,
            threshold=0.0,
            batch_size=args.batch_size,
            config_file=args.config_file,
            overrides=args.overrides,
        )
        for file in files
    ]
    truth = read_truth(args.dataset, args.images)
    data = Path(args.dataset).name
    names = [Path(file).name for file in files]
    if len(set(names)) < len(names):
        names = files
    options = ReportOptions(
        title=f"{names[0]} on {data}",
        names=(names[0], names[-1]),
        command=shlex.join(["miti-detr", *sys.argv[1:]]),
        pictures=args.pictures,
        resamples=args.resamples,
    )
    # disable=None hides the bar unless standard error is a terminal.
    with tqdm(total=len(files) * len(truth.files), unit="image", disable=None) as bar:
        evaluation = report_model(
            predictors[0],
            truth,
            Path(args.output),
            options,
            against=predictors[1] if args.against else None,
            advance=bar.update,
        )
    found = evaluation.thresholds
    f1 = found.verified.f1
    print(
        f"AP {evaluation.coco['AP']:.1f}, AP50 {evaluation.coco['AP50']:.1f}; threshold "
        f"{found.chosen:.3f}" + ("" if f1 is None else f" with F1 {100 * f1:.1f} on other images")
    )
    print(Path(args.output) / "report.html")
    if args.store_threshold:
        if not found.on_choice.true:
            raise ValueError("no detection is true, so there is no threshold to store")
        store_threshold(args.weights, found.chosen)
        print(f"stored the threshold in {args.weights}")
    return 0
