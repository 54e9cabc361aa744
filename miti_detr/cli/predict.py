"""``miti-detr predict``: draws boxes on images, and writes COCO results."""

import argparse
import sys
import time
from pathlib import Path

from .arguments import add_model_arguments, fraction, positive_int, split_overrides


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "predict",
        help="draw boxes on images and write COCO results",
        description="Writes a picture with boxes for each image, and predictions.json in COCO's "
        "result format. Unreadable files are reported and skipped. Pictures under 320 pixels are "
        "enlarged; the JSON file uses the pixels of the image.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER")
    parser.add_argument(
        "--output",
        metavar="DIR",
        required=True,
        help="folder for the pictures and predictions.json",
    )
    parser.add_argument(
        "--threshold", type=fraction, default=0.5, help="lowest score (default 0.5)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=4,
        help="number of images per forward pass (default 4)",
    )
    add_model_arguments(parser)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Predict; the exit status is 1 if no image could be read."""
    from tqdm import tqdm

    from miti_detr.engine import prepare_cpu
    from miti_detr.engine.predictor import Predictor, load_config
    from miti_detr.visualize.classes import class_table
    from miti_detr.visualize.predictions import find_images, predict_images

    words, overrides = split_overrides(args.images)
    images = find_images(words)
    cfg = load_config(
        args.config_file, weights=args.weights, overrides=[*overrides, *args.overrides]
    )
    if cfg.MODEL.DEVICE == "cpu":
        prepare_cpu()
    predictor = Predictor(cfg)
    start = time.perf_counter()
    # disable=None hides the bar unless standard error is a terminal.
    with tqdm(total=len(images), unit="img", disable=None) as bar:
        summary = predict_images(
            predictor,
            images,
            Path(args.output),
            classes=class_table(next(iter(cfg.DATASETS.TEST), None), cfg.MODEL.DETR.NUM_CLASSES),
            threshold=args.threshold,
            batch_size=args.batch_size,
            advance=bar.update,
        )
    rate = len(summary.pictures) / (time.perf_counter() - start)
    for path, reason in summary.skipped:
        print(f"miti-detr: skipped {path}: {reason}", file=sys.stderr)
    print(
        f"{len(summary.pictures)} of {len(images)} images, {len(summary.results)} detections with "
        f"score >= {args.threshold:g}, {rate:.1f} images/s -> {args.output}"
    )
    return 0 if summary.pictures else 1
