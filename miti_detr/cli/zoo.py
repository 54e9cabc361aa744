"""``miti-detr zoo``: lists the trained models that the package brings."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "zoo",
        help="list the trained models that the package brings",
        description="Lists the trained models that the package brings: the data and AP of their "
        "evaluation (of boxes, in percent), parameters, size, and minutes of training.",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, and how to use a model."""
    from tabulate import tabulate

    from miti_detr.model_zoo import zoo_models
    from miti_detr.model_zoo.zoo import PREFIX

    models = zoo_models()
    rows = []
    for m in models.values():
        numbers = (f"{m.AP:.1f}", f"{m.parameters:,}", f"{m.megabytes:.1f}", f"{m.minutes:.0f}")
        rows.append([m.name, m.test, *numbers])
    headers = ["name", "data", "AP", "parameters", "MB", "minutes"]
    aligned = ["left", "left", *["right"] * 4]
    print(tabulate(rows, headers, colalign=aligned, disable_numparse=True))
    print(f"\nTo use one: miti-detr predict --weights {PREFIX}NAME --output predictions IMAGE")
    return 0
