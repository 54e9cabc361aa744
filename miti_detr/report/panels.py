"""Panels of a page: one PNG each, so that they fit the screen of a phone."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Sheet

from miti_detr.files import replacing


def draw_panel(path: Path, draw: Callable[[Axes], bool], *, legend: bool = True) -> bool:
    """Draw a panel in the style of the pages.

    Args:
        path: PNG file.
        draw: draws on the axes; returns whether there was anything to draw.
        legend: add a legend.

    Returns:
        Whether the file was written.
    """
    sheet = Sheet(figsize=(5.2, 3.7), dpi=110, layout="constrained")
    axis = sheet.subplots()
    if not draw(axis):
        return False
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    with replacing(path) as temporary:
        sheet.savefig(temporary, format="png")
    return True
