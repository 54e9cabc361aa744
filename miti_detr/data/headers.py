"""Looking at many image files, at their headers alone."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")

MAX_OPENED = 5000  # images of a data set that are looked at; of a larger one a sample


def find_faults(images: Sequence[Item], fault: Callable[[Item], str]) -> tuple[list[str], int]:
    """Look at images, at most 5,000 of them, evenly spread.

    Args:
        images: of a data set.
        fault: says what is wrong with one, or "".

    Returns:
        What was found, and the number of images that were looked at.
    """
    sample = images[:: -(-len(images) // MAX_OPENED) or 1]
    with ThreadPoolExecutor(8) as pool:  # waits for the disk, mostly
        return [found for found in pool.map(fault, sample) if found], len(sample)
