"""Parts of a self-contained page: tables and figures, as HTML, JSON and CSV.

A cell of a table is a text, a number, None, or a dict: ``mean`` with ``sd``, or ``mean`` with
``low`` and ``high``, and sometimes ``n``, ``note``, ``text`` that is shown instead of the number,
and ``is_difference`` False for intervals of values that are written without a sign.
"""

import base64
import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from miti_detr.bench.machine import describe_machine
from miti_detr.engine import version
from miti_detr.files import write_text

Cell = str | int | float | dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the page.

    Attributes:
        key: name in files.
        title: title above the table.
        columns: headers; the first is the header of the row names.
        rows: rows, each as long as ``columns``.
        digits: number of digits after the decimal point.
        note: explanation below the table.
    """

    key: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    digits: int = 2
    note: str = ""


def cell_text(cell: Cell, digits: int) -> str:
    """Format a cell for readers.

    Args:
        cell: a cell as described in this module.
        digits: number of digits after the decimal point; integers have none.
    """
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "\u2013"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    if not isinstance(cell, dict):
        return f"{cell:.{digits}f}"
    if "text" in cell:
        return str(cell["text"])
    sign = "+" if "low" in cell and cell.get("is_difference", True) else ""
    text = f"{cell['mean']:{sign}.{digits}f}"
    if cell.get("low") is not None:
        text += f" [{cell['low']:{sign}.{digits}f}, {cell['high']:{sign}.{digits}f}]"
    elif cell.get("sd") is not None:
        text += f" \u00b1 {cell['sd']:.{digits}f}"
    return text + (f" ({cell['note']})" if "note" in cell else "")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of the page.

    Attributes:
        path: PNG file.
        caption: description of what it shows.
    """

    path: Path
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: title of the part.
        tables: tables, in order.
        figures: figures, in order.
    """

    title: str
    tables: list[Table]
    figures: list[Figure]


def section_json(section: Section, output: Path) -> dict[str, Any]:
    """A section as JSON; files are relative to the folder of the page."""
    return {
        "title": section.title,
        "tables": [dataclasses.asdict(table) for table in section.tables],
        "figures": [
            {"file": figure.path.relative_to(output).as_posix(), "caption": figure.caption}
            for figure in section.figures
        ],
    }


def write_page(
    output: Path,
    template: Traversable,
    content: Mapping[str, Any],
    more: Sequence[tuple[str, Table]],
) -> Path:
    """Write ``report.html``, ``report.json`` and ``report.csv``.

    Args:
        output: folder, which has the pictures of the page.
        template: Jinja2's, which extends ``page.html`` and may import ``macros.html``. The filter
            ``cell`` formats a cell and ``data_uri`` embeds a picture.
        content: variables of the template, and content of the JSON file; ``sections`` are those
            of :func:`section_json`. Version and machine are added.
        more: tables of the CSV file besides those of the sections, each with a title.

    Returns:
        Path of the HTML file.
    """
    content = {**content, "version": version(), "machine": describe_machine()}
    environment = Environment(
        loader=FunctionLoader(_shared_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell_text
    environment.filters["data_uri"] = lambda name: _data_uri(output / name)
    page = environment.from_string(template.read_text(encoding="utf-8")).render(**content)
    write_text(output / "report.json", json.dumps(_finite(content), indent=1, ensure_ascii=False))
    tables = [(s["title"], table) for s in content["sections"] for table in s["tables"]]
    tables += [(title, dataclasses.asdict(table)) for title, table in more]
    write_text(output / "report.csv", _tables_csv(tables))
    write_text(output / "report.html", page)
    return output / "report.html"


def _tables_csv(tables: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return tables in long form: one line per numeric cell.

    Args:
        tables: name of the group and the table as JSON.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "table", "row", "column", "value", "sd", "low", "high", "n"])
    for group, table in tables:
        for row in table["rows"]:
            for column, cell in zip(table["columns"][1:], row[1:], strict=True):
                values = cell if isinstance(cell, dict) else {"mean": cell}
                if isinstance(values["mean"], (int, float)):
                    numbers = [values.get(key) for key in ("mean", "sd", "low", "high", "n")]
                    writer.writerow([group, table["key"], row[0], column, *numbers])
    return text.getvalue()


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return value


def _shared_template(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _data_uri(path: Path) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
