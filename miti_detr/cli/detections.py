"""``miti-detr detections``: draws ground truth and detections on images of a data set.

For a pre-training, it draws patches and where the model finds them.
"""

import argparse
from pathlib import Path

from .arguments import add_model_arguments, fraction, positive_int


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "detections",
        help="draw ground truth and detections side by side",
        description="Draws ground truth (left) and detections (right) on images of a data set. "
        "For a pre-training, draws patches of the images (left) and where the model finds them "
        "(right).",
    )
    add_model_arguments(parser)
    parser.add_argument("--dataset", metavar="NAME", help="default: the first of DATASETS.TEST")
    parser.add_argument(
        "--images", type=positive_int, default=8, help="number of images (default 8)"
    )
    parser.add_argument(
        "--threshold", type=fraction, default=0.5, help="lowest score (default 0.5)"
    )
    parser.add_argument("--output", metavar="PNG", required=True)
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and print the path of the picture."""
    from miti_detr.engine.predictor import Predictor, load_config
    from miti_detr.visualize.detections import draw_detections
    from miti_detr.visualize.patches import draw_patches

    overrides = ["TEST.MASK_MIN_SCORE", str(args.threshold), *args.overrides]
    cfg = load_config(args.config_file, weights=args.weights, overrides=overrides)
    dataset = args.dataset or next(iter(cfg.DATASETS.TEST), None)
    if dataset is None:
        raise ValueError("DATASETS.TEST is empty. Name a data set with --dataset")
    if cfg.INPUT.PATCHES.NUMBER > 0:
        draw_patches(cfg, dataset, Path(args.output), images=args.images)
        print(args.output)
        return 0
    draw_detections(
        Predictor(cfg),
        dataset,
        Path(args.output),
        num_classes=cfg.MODEL.DETR.NUM_CLASSES,
        images=args.images,
        threshold=args.threshold,
    )
    print(args.output)
    return 0
