"""``miti-detr attention``: draws on an image what queries and pixels attend to."""

import argparse
from pathlib import Path

from .arguments import add_models_arguments, positive_int, split_overrides


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "attention",
        help="draw what queries and pixels attend to",
        description="Draws, for each image, what the object queries with the highest scores "
        "attend to in the decoder and what pixels attend to in the encoder, per layer and head. "
        "Several models are shown side by side.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE|FOLDER")
    add_models_arguments(parser, fresh=False)
    add("--queries", type=positive_int, default=4, help="number of queries, by score (default 4)")
    add(
        "--pixel",
        dest="pixels",
        type=_pixel,
        metavar="X,Y",
        action="append",
        help="position for the encoder's maps; default: the centres of the first model's boxes",
    )
    add("--output", metavar="DIR", required=True, help="folder for the pictures")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Draw, and print the paths of the pictures."""
    from miti_detr.predict.sources import find_images
    from miti_detr.rank.models import load_models
    from miti_detr.visualize.attention_sheet import draw_attention
    from miti_detr.visualize.classes import class_table

    words, overrides = split_overrides(args.images)
    overrides = [*overrides, *args.overrides]
    images = find_images(words)
    models = load_models(args.config_file, args.weights, overrides=overrides)
    cfg = models[0].cfg
    classes = class_table(next(iter(cfg.DATASETS.TEST), None), cfg.MODEL.DETR.NUM_CLASSES)
    for path in images:
        pictures = draw_attention(
            [(model.name, model.predictor) for model in models],
            path,
            Path(args.output),
            classes=classes,
            num_queries=args.queries,
            pixels=args.pixels,
        )
        print("\n".join(map(str, pictures)), flush=True)
    return 0


def _pixel(text: str) -> tuple[float, float]:
    """Parse ``120,64``."""
    x, _, y = text.partition(",")
    try:
        return float(x), float(y)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a position X,Y such as 120,64") from None
