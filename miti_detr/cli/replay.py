"""``miti-detr replay``: runs the recorded step of a non-finite loss again."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "replay",
        help="run the step of a non-finite loss again",
        description="Runs the training step that a run recorded when a loss became non-finite.",
    )
    parser.add_argument("record", metavar="FILE", help="the file that the stopped run named")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Replay and print where the first value that is not finite arose."""
    from miti_detr.engine.hooks.nonfinite import replay

    print(replay(args.record))
    return 0
