"""Pages of the documentation site that are not in docs/; standard library only."""

import ast
import os
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Pages at the top of the repository and their names on the site
TOP = {path.name: path.name.lower() for path in ROOT.glob("*.md")} | {"README.md": "index.md"}
LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)")


def written_pages() -> Iterator[tuple[str, str, set[str]]]:
    """Yield name, text and linked files of each page that is written by hand.

    All these pages are in one folder on the site. Links to files that are no pages of the site lead
    to their copies below ``files/``.
    """
    sources = {ROOT / name: page for name, page in TOP.items()}
    sources |= {path: path.name for path in (ROOT / "docs").glob("*.md")}
    for source, name in sources.items():
        yield name, *_with_links_of_the_site(source)


def _with_links_of_the_site(source: Path) -> tuple[str, set[str]]:
    linked = set[str]()

    def link(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(source.parent / match[1])).relative_to(ROOT).as_posix()
        if path in TOP:
            return f"]({TOP[path]}"
        if path.startswith("docs/"):
            return f"]({path.removeprefix('docs/')}"
        linked.add(path)
        return f"](files/{path}"

    return LINK.sub(link, source.read_text()), linked


def api_pages() -> Iterator[tuple[str, str]]:
    """Yield name and text of a page for each room, with the names that its packages export."""
    for package in [ROOT / "miti_detr", *sorted((ROOT / "miti_detr").iterdir())]:
        top = package.name == "miti_detr"
        files = [package / "__init__.py"] if top else sorted(package.rglob("__init__.py"))
        text = "".join(map(_package_text, files))
        if text:
            yield f"api/{package.name}.md", text


def _package_text(file: Path) -> str:
    """Return the part of a page for one package: its docstring and what it exports."""
    module = ast.parse(file.read_text())
    dotted = ".".join(file.parent.relative_to(ROOT).parts)
    lists = [
        ast.literal_eval(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    folders = {path.name for path in file.parent.iterdir()}
    names = [n for n in lists[-1] if n not in folders and n[:2] != "__"] if lists else []
    if not names:
        return ""
    level = "#" * min(dotted.count(".") or 1, 2)
    parts = [
        f"{level} {dotted}",
        ast.get_docstring(module) or "",
        *(f"::: {dotted}.{n}" for n in names),
    ]
    return "\n\n".join(parts) + "\n\n"


class Key(NamedTuple):
    """A config key: its name, the function of config.py that adds it, its default and meaning."""

    name: str
    function: str
    default: str
    meaning: str


def config_keys(text: str) -> list[Key]:
    """Return the keys that ``config.py`` adds, in its order.

    Args:
        text: of the file. The meaning is the comment above an assignment or at its end; that of a
            section belongs to its first key.
    """
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assignments = [
        (function.name, node)
        for function in functions
        for node in function.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
    ]
    lines, found, section = text.splitlines(), [], list[str]()
    for function, node in assignments:
        target, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
        start = node.lineno - 1
        while lines[start - 1].lstrip().startswith("# "):
            start -= 1
        comments = [line.strip()[2:] for line in lines[start : node.lineno - 1]]
        comments += lines[node.lineno - 1].split("  # ")[1:]
        if value == "CN()":
            section = comments
            continue
        name = re.sub(r"^detr\.", "cfg.MODEL.DETR.", target).removeprefix("cfg.")
        found.append(Key(name, function, value, "\n".join([*section, *comments])))
        section = []
    return found


def config_keys_page() -> str:
    """Return the page of the config keys, with a section for each function."""
    parts = ["# Config keys", "The keys that `add_miti_detr_config` adds to those of Detectron2."]
    keys = config_keys((ROOT / "miti_detr/config.py").read_text())
    for function, group in groupby(keys, lambda key: key.function):
        title = function.removeprefix("_add_").removesuffix("_keys").capitalize()
        parts.append(f"## {'General' if function == '_defaults' else title}")
        for key in group:
            choices = re.sub(r"^  (\S+) +", r"\n- `\1`: ", key.meaning, flags=re.M)
            parts += [f"### {key.name}", f"Default: `{key.default}`", choices]
    return "\n\n".join(parts)
