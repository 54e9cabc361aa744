"""``miti-detr <command>``: runs one command and turns expected errors into one line."""

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence

# One module of this package each, with add_parser(subparsers) and run(args) -> exit status. They
# import what is heavy inside run, so that the help comes at once.
COMMANDS = (
    "predict",
    "curves",
    "detections",
    "compare",
    "rank",
    "attention",
    "convert",
    "replay",
    "bench",
    "doctor",
)

# What bad input raises. Anything else is a fault of the program and keeps its traceback.
EXPECTED_ERRORS = (ValueError, KeyError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after ``miti-detr``; None reads them from the process.

    Returns:
        The exit status: 0 done, 1 an expected error (one line on standard error), 130 interrupted.
        Wrong usage leaves with status 2 by ``SystemExit``, as argparse does.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    _take_overrides(parser, args, rest)
    logging.basicConfig(level=logging.WARNING, format="miti-detr: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    try:
        return args.func(args)
    except KeyboardInterrupt:
        print("miti-detr: interrupted", file=sys.stderr)
        return 130
    except EXPECTED_ERRORS as error:
        if args.traceback:
            raise
        print(f"miti-detr: error: {_one_line(error)}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="miti-detr", description="Miti-DETR and DETR for Detectron2."
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show where an error comes from, not its line alone",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"miti_detr.cli.{name}").add_parser(subparsers)
    return parser


def _take_overrides(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Give the words that no argument took to a command that takes config overrides."""
    takes_them = hasattr(args, "overrides") and not any(word.startswith("--") for word in rest)
    if rest and not takes_them:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    # str(KeyError) is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
