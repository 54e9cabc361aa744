"""The COCO table of a run as text."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from tabulate import tabulate

from miti_detr.files import write_text

logger = logging.getLogger(__name__)

_ROWS = (
    ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    ("AR", "AR1", "AR10", "ARs", "ARm", "ARl"),
    *(tuple(f"{name}{group}" for name in ("PQ", "SQ", "RQ")) for group in ("", "_th", "_st")),
)
_PER_CLASS = ("AP", "PQ")  # of which the metrics of a class are called "AP-name"
_NAME_WIDTH = 26


def coco_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Lay out COCO results in at most 80 columns.

    Args:
        results: data set to task to metric to value in 0..100; a value that cannot be computed is
            NaN.

    Returns:
        For each data set and task the precisions, the recalls and the AP of each class; for
        panoptic segmentation the qualities of all classes, of things, of stuff and of each class.
    """
    blocks = []
    for dataset, tasks in results.items():
        for task, metrics in tasks.items():
            if not any(name in metrics for row in _ROWS for name in row):
                continue  # of another kind, such as the validation loss
            blocks.append(f"{dataset}, {task} (COCO, in percent)")
            blocks += [_row(names, metrics) for names in _ROWS if set(names) & set(metrics)]
            for kind in _PER_CLASS:
                prefix = f"{kind}-"
                classes = {
                    k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)
                }
                if classes:
                    blocks.append(_class_table(kind, classes))
    return "\n\n".join(blocks) + "\n"


def write_coco_table(
    results: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | Path
) -> None:
    """Write and log :func:`coco_table`.

    Args:
        results: see there.
        path: text file; its folder is made.
    """
    table = coco_table(results)
    write_text(path, table)
    logger.info("%s:\n%s", path, table)


def _row(names: tuple[str, ...], metrics: Mapping[str, float]) -> str:
    values = [_number(metrics.get(name, math.nan)) for name in names]
    return tabulate([values], headers=names, disable_numparse=True, stralign="right")


def _class_table(kind: str, classes: Mapping[str, float]) -> str:
    """A metric of each class, in two columns from top to bottom."""
    cells = [(name[:_NAME_WIDTH], _number(v)) for name, v in classes.items()]
    half = math.ceil(len(cells) / 2) if len(cells) > 5 else len(cells)
    left, right = cells[:half], cells[half:]
    rows = [a + (right[i] if i < len(right) else ("", "")) for i, a in enumerate(left)]
    columns = 4 if right else 2
    return tabulate(
        [row[:columns] for row in rows],
        headers=("class", kind) * (columns // 2),
        disable_numparse=True,
        colalign=("left", "right") * (columns // 2),
    )


def _number(value: float) -> str:
    return "nan" if math.isnan(value) else f"{value:.2f}"
