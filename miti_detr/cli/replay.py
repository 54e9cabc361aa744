"""``miti-detr replay``: repeats the recorded step of a non-finite loss."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "replay",
        help="repeat the step of a non-finite loss",
        description="Repeats the training step at which the loss of a run became non-finite.",
    )
    parser.add_argument("record", metavar="FILE", help="file named by the stopped run")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Replay, and print where the first non-finite value appeared."""
    from miti_detr.engine.hooks.nonfinite import replay

    print(replay(args.record))
    return 0
