"""The rules of the house, as CONTRIBUTING.md states them."""

import ast
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "miti_detr"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())

# What each room may import of the others. `files` and `config` are open to all.
MAY_IMPORT = {
    "layers": set(),
    "checkpoint": set(),
    "model_zoo": set(),
    "data": set(),
    "modeling": {"layers", "checkpoint"},
    "evaluation": {"data"},
    "rank": {"layers", "modeling", "data", "engine", "visualize"},
    "engine": {"layers", "modeling", "data", "evaluation", "checkpoint", "model_zoo", "rank"},
    "visualize": {"layers", "modeling", "data", "engine", "evaluation", "checkpoint", "rank"},
    "study": {"data", "engine", "visualize"},
    "cli": set(ROOMS),
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports, its own left out."""
    package = path.relative_to(ROOT).parts[:-1]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        rooms |= {n.split(".")[1] for n in names if n.startswith("miti_detr.")}
    return {room for room in rooms if room in ROOMS} - {package[1] if len(package) > 1 else ""}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    parts = path.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return  # the package's own files put the rooms together
    assert imported_rooms(path) <= MAY_IMPORT[parts[0]]


def test_every_room_has_a_rule():
    assert set(ROOMS) == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not prints or "cli" in path.parts


def test_layers_know_neither_detectron2_nor_configs():
    for path in (PACKAGE / "layers").glob("*.py"):
        assert "detectron2" not in path.read_text().replace("Detectron2", "")
