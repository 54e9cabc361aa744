"""``miti-detr rank``: measures how similar tokens become from layer to layer."""

import argparse
from pathlib import Path

from .arguments import add_models_arguments, positive_int, split_overrides


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "rank",
        help="measure rank collapse, layer by layer",
        description="Measures how far the tokens of an image and the object queries are from "
        "being identical after each transformer layer. Several models are shown side by side.",
    )
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE|FOLDER", help="default: two noise images")
    add_models_arguments(parser, fresh=True)
    add("--seed", type=int, default=0, help="seed of the random initialisation (default 0)")
    add(
        "--theory",
        action="store_true",
        help="without a model: variants of the residual, and pure attention, at initialisation",
    )
    add("--seeds", type=positive_int, default=3, help="number of seeds of --theory (default 3)")
    add(
        "--output",
        metavar="DIR",
        help="folder for rank.json and rank.png, or the tables of --theory",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print tables, write files."""
    return _run_theory(args) if args.theory else _run_models(args)


def _run_models(args: argparse.Namespace) -> int:
    from miti_detr.predict.sources import find_images
    from miti_detr.rank.charts import draw_chart
    from miti_detr.rank.models import load_models, rank_models, write_record
    from miti_detr.rank.tables import comparison_table, model_table

    words, overrides = split_overrides(args.images)
    images = find_images(words) if words else []
    loaded = load_models(
        args.config_file,
        args.weights,
        overrides=[*overrides, *args.overrides],
        seed=args.seed,
    )
    models = rank_models(loaded, images)
    for model in models:
        print(f"{model_table(model)}\n")
    print(comparison_table(models))
    if args.output:
        folder = Path(args.output)
        write_record(models, images, folder / "rank.json")
        draw_chart(models, folder / "rank.png")
        print(f"{folder / 'rank.json'}\n{folder / 'rank.png'}")
    return 0


def _run_theory(args: argparse.Namespace) -> int:
    import json

    from miti_detr.files import write_text
    from miti_detr.rank.models import plain
    from miti_detr.rank.theory import TheorySpec
    from miti_detr.rank.theory_tables import theory, theory_tables

    if args.weights or args.config_file or args.images:
        raise ValueError(
            "--theory takes no model, images or config keys: give only --seeds and --output"
        )
    panels, pure = theory(TheorySpec(seeds=args.seeds))
    tables = theory_tables(panels, pure)
    print("\n\n".join(tables))
    if args.output:
        folder, record = Path(args.output), {"panels": panels, "pure": pure}
        write_text(folder / "rank_theory.txt", "\n\n".join(tables) + "\n")
        write_text(
            folder / "rank_theory.json",
            json.dumps(plain(record), indent=1),
        )
        print(f"\n{folder / 'rank_theory.txt'}\n{folder / 'rank_theory.json'}")
    return 0
