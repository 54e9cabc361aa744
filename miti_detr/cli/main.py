"""``miti-detr <command>``: runs one command and turns expected errors into one line."""

import argparse
import contextlib
import importlib
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence

from miti_detr.streams import discard_output, prepare_streams

# Each is a module of this package with add_parser(subparsers) and run(args) -> exit status. Heavy
# imports are inside run, so that the help appears at once.
COMMANDS = (
    "train",
    "predict",
    "curves",
    "detections",
    "report",
    "compare",
    "rank",
    "attention",
    "export",
    "convert",
    "replay",
    "bench",
    "zoo",
    "doctor",
)

# What bad input raises. Any other exception is a fault of the program and keeps its traceback.
EXPECTED_ERRORS = (ValueError, KeyError, OSError, ImportError)
INTERRUPTED = 128 + signal.SIGINT  # exit statuses, by the convention of shells
BROKEN_PIPE = 128 + signal.SIGPIPE
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command like Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after ``miti-detr``; None reads them from the process.

    Returns:
        The exit status: 0 done, 1 an expected error (one line on standard error), 130 after
        Ctrl-C, 143 after SIGTERM, 141 if the reader of a pipe has gone. Wrong usage exits with
        status 2 through ``SystemExit``, as argparse does.
    """
    prepare_streams()
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    _take_overrides(parser, args, rest)
    logging.basicConfig(level=logging.WARNING, format="miti-detr: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    try:
        with _sigterm_raises():
            status = args.func(args)
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        discard_output()
        return BROKEN_PIPE
    except KeyboardInterrupt as interrupt:
        print("miti-detr: interrupted", file=sys.stderr)
        return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
    except EXPECTED_ERRORS as error:
        if args.traceback:
            raise
        print(f"miti-detr: error: {_one_line(error)}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """While entered, raise :class:`Terminated` in the main thread on SIGTERM."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="miti-detr", description="Miti-DETR and DETR for Detectron2."
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="show the traceback of an error",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"miti_detr.cli.{name}").add_parser(subparsers)
    return parser


def _take_overrides(
    parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]
) -> None:
    """Pass words that match no argument to a command that accepts config overrides."""
    takes_them = hasattr(args, "overrides") and not any(word.startswith("--") for word in rest)
    if rest and not takes_them:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    # str() of a KeyError is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
