"""The report of a comparison: one self-contained HTML file, and the same as CSV and JSON."""

import base64
import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from miti_detr.bench.machine import describe_machine
from miti_detr.engine import version
from miti_detr.files import write_text

from .comparison import Comparison
from .differences import TRUTH, ComparedImage, draw_most_different
from .figures import Figure, arm_styles, draw_figures
from .tables import Table, cell_text, group_tables, runs_table

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


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: title of the part.
        tables: tables, in order.
        figures: figures, in order.
    """

    title: str
    tables: list[Table]
    figures: list[Figure]


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
    sections = []
    for index, (title, arms) in enumerate(comparison.groups.items()):
        folder = output / "figures" / f"{index + 1}"
        figures = draw_figures(arms, comparison, folder, styles)
        sections.append(Section(title, group_tables(arms, comparison), figures))
    first = next(iter(comparison.groups.values()))
    pictures, pictures_note = draw_most_different(
        first, output / "figures" / "4", images=images, threshold=comparison.threshold
    )
    content = {
        "title": comparison.title,
        "command": command,
        "version": version(),
        "machine": describe_machine(),
        "shared": SHARED if studied else "",
        "threshold": comparison.threshold,
        "missing": [*comparison.missing, *([] if pictures else [pictures_note])],
        "sections": [_section_json(section, output) for section in sections],
        "pictures": [_picture_json(image, output) for image in pictures],
        "pictures_of": pictures_note,
        "runs": dataclasses.asdict(runs_table(comparison)),
        "published": dataclasses.asdict(PUBLISHED),
    }
    write_text(output / "report.json", json.dumps(_finite(content), indent=1, ensure_ascii=False))
    write_text(output / "report.csv", report_csv(content))
    write_text(output / "report.html", render_html(content, output))
    return output / "report.html"


def render_html(content: Mapping[str, Any], folder: Path) -> str:
    """Render the HTML page from the content of ``report.json``.

    Args:
        content: content of ``report.json``.
        folder: folder of the pictures, which are embedded in the page.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = cell_text
    environment.filters["data_uri"] = lambda name: _data_uri(folder / name)
    source = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(truth=TRUTH, **content)


def report_csv(content: Mapping[str, Any]) -> str:
    """Return all tables in long form: one line per numeric cell.

    Args:
        content: content of ``report.json``.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "table", "row", "column", "value", "sd", "low", "high", "n"])
    tables = [(s["title"], table) for s in content["sections"] for table in s["tables"]]
    for group, table in [*tables, ("", content["runs"])]:
        for row in table["rows"]:
            for column, cell in zip(table["columns"][1:], row[1:], strict=True):
                values = cell if isinstance(cell, dict) else {"mean": cell}
                if isinstance(values["mean"], (int, float)):
                    numbers = [values.get(key) for key in ("mean", "sd", "low", "high", "n")]
                    writer.writerow([group, table["key"], row[0], column, *numbers])
    return text.getvalue()


def _section_json(section: Section, output: Path) -> dict[str, Any]:
    return {
        "title": section.title,
        "tables": [dataclasses.asdict(table) for table in section.tables],
        "figures": [
            {"file": figure.path.relative_to(output).as_posix(), "caption": figure.caption}
            for figure in section.figures
        ],
    }


def _picture_json(image: ComparedImage, output: Path) -> dict[str, Any]:
    files = {name: path.relative_to(output).as_posix() for name, path in image.pictures.items()}
    return {"image": image.file_name, "files": files, "errors": image.errors}


def _data_uri(path: Path) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value
