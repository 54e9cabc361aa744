"""Arguments shared by several commands."""

import argparse
import os
import re

# Keys below the sections of Detectron2's config, such as MODEL.DEVICE.
CONFIG_KEY = re.compile(r"(MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST|GLOBAL)(\.[A-Z0-9_]+)+")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config-file``, ``--weights`` and ``KEY VALUE ...`` (``args.overrides``)."""
    parser.add_argument(
        "--config-file", metavar="C", help="YAML file; default: the config in the checkpoint"
    )
    parser.add_argument("--weights", metavar="W", required=True, help="checkpoint of the model")
    _take_overrides(parser)


def add_models_arguments(parser: argparse.ArgumentParser, *, fresh: bool) -> None:
    """Add ``--weights`` and ``--config-file``, both repeatable, and ``KEY VALUE ...``.

    Args:
        parser: parser of the command.
        fresh: whether configs without weights are allowed, for randomly initialised models.
    """
    weights = "checkpoint; repeat for more models"
    config = "YAML file; default: the config in the checkpoint"
    if fresh:
        config += ". Without --weights: random initialisation"
    for name, letter, text in (("--weights", "W", weights), ("--config-file", "C", config)):
        needed = name == "--weights" and not fresh
        parser.add_argument(
            name, metavar=letter, action="append", default=[], required=needed, help=text
        )
    _take_overrides(parser)


def _take_overrides(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(overrides=[])
    parser.epilog = "KEY VALUE pairs at the end override the config, such as MODEL.DEVICE cpu."


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words before the first config key that is not the name of a file.

    Returns:
        The words before the key, and the key with all words after it.
    """
    for index, word in enumerate(words):
        if CONFIG_KEY.fullmatch(word) and not os.path.exists(word):
            return words[:index], words[index:]
    return words, []


def positive_int(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def natural_int(text: str) -> int:
    """Parse an integer of at least 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def fraction(text: str) -> float:
    """Parse a number in [0, 1], for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def percentage(text: str) -> float:
    """Parse a number above 0 and up to 100, for argparse."""
    value = float(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 100")
    return value


def seed_count(text: str) -> int:
    """Parse a number of seeds, for argparse."""
    value = positive_int(text)
    if value > 1000:
        raise argparse.ArgumentTypeError(f"{text} is more than 1000")
    return value
