"""The report of a comparison: one self-contained HTML file, and the same as CSV and JSON."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

from miti_detr.report.page import Section, Table, section_json, write_page

from .choose import choices_table
from .claims import claims_table
from .comparison import Comparison
from .drawing.differences import TRUTH, ComparedImage, draw_most_different
from .drawing.figures import arm_styles, draw_figures
from .tables import group_tables, runs_table

# From the paper: COCO val2017 after 300 epochs, quoted for comparison.
PUBLISHED = Table(
    "published",
    "Table 1 of the paper (quoted)",
    ["model", "AP", "AP50", "AP75", "APs", "APm", "APl"],
    [
        ["DETR R50", 37.6, 57.8, 39.3, 18.0, 40.6, 55.7],
        ["UP-DETR R50", 33.1, 50.9, 34.2, 14.6, 35.0, 50.1],
        ["Miti-DETR R50", 40.5, 60.4, 42.7, 19.7, 43.9, 59.3],
    ],
    digits=1,
    note="Quoted, not measured here: COCO val2017, 300 epochs, one run each.",
)
SHARED = (
    "All runs with the same seed see the same images in the same order with the same augmentation, "
    "whatever the model. Arms whose parameters have the same shapes start from the same weights."
)


def write_report(
    comparison: Comparison, output: Path, *, command: str, images: int = 8, studied: bool = True
) -> Path:
    """Write ``report.html``, ``report.json``, ``report.csv`` and ``figures/`` into a folder.

    Args:
        comparison: comparison to report.
        output: folder.
        command: command that writes this report, shown in it.
        images: number of images in Figure 4.
        studied: whether the runs belong to a study, so that :data:`SHARED` holds.

    Returns:
        Path of the HTML file.
    """
    styles = arm_styles(comparison)
    claims = claims_table(comparison)
    sections = [Section("Claims", [claims], [])] if claims else []
    if comparison.choices:
        sections.append(Section("Choice", [choices_table(comparison.choices)], []))
    for index, (title, arms) in enumerate(comparison.groups.items()):
        folder = output / "figures" / f"{index + 1}"
        figures = draw_figures(arms, comparison, folder, styles)
        sections.append(Section(title, group_tables(arms, comparison), figures))
    first = next(iter(comparison.groups.values()))
    pictures, pictures_note = draw_most_different(
        first, output / "figures" / "4", images=images, threshold=comparison.threshold
    )
    runs = runs_table(comparison)
    content = {
        "title": comparison.title,
        "command": command,
        "shared": SHARED if studied else "",
        "threshold": comparison.threshold,
        "missing": [*comparison.missing, *([] if pictures else [pictures_note])],
        "sections": [section_json(section, output) for section in sections],
        "pictures": [_picture_json(image, output) for image in pictures],
        "pictures_of": pictures_note,
        "truth": TRUTH,
        "runs": dataclasses.asdict(runs),
        "published": dataclasses.asdict(PUBLISHED),
    }
    template = resources.files(__package__).joinpath("report.html")
    return write_page(output, template, content, [("", runs)])


def _picture_json(image: ComparedImage, output: Path) -> dict[str, Any]:
    files = {name: path.relative_to(output).as_posix() for name, path in image.pictures.items()}
    return {"image": image.file_name, "files": files, "errors": image.errors}
