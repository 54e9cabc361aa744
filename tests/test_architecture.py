"""The house rules, as CONTRIBUTING.md states them."""

import ast
import collections
import re
from pathlib import Path

from tests.helpers import ROOT

PACKAGE = ROOT / "miti_detr"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())

# The other rooms that each room may import. Modules at the top of the package are open to all.
BELOW_ENGINE = {"layers", "accelerate", "modeling", "data", "evaluation", "checkpoint", "model_zoo"}
BESIDE_CLI = {"rank", "study", "visualize", "report", "predict", "export", "bench"}
BELOW_CLI = BELOW_ENGINE | BESIDE_CLI | {"engine"}
MAY_IMPORT = {
    "layers": set(),
    "accelerate": {"layers"},
    "model_zoo": set(),
    "data": set(),
    "modeling": {"layers", "accelerate"},
    "checkpoint": {"layers", "modeling"},
    "evaluation": {"data"},
    "engine": BELOW_ENGINE | {"rank"},
    **dict.fromkeys(BESIDE_CLI, BELOW_CLI),
    "finetune": BELOW_CLI,
    "cli": BELOW_CLI | {"finetune"},
}
# Of modeling; they do not import each other. deformable_segmentation joins two of them.
SYSTEMS = {"pretrain", "deformable", "segmentation"}
# What belongs to accelerate/ only
KERNELS = re.compile(r"autograd\.Function|mkldnn|__class__ = |channels_last")
ROOM_LINES, FILE_LINES, FUNCTION_LINES = 2500, 350, 60


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports, from this repository and from others."""
    package = path.relative_to(ROOT).parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports, except its own."""
    own = path.relative_to(PACKAGE).parts[0]
    rooms = {n.split(".")[1] for n in imported_names(path) if n.startswith("miti_detr.")}
    return {room for room in rooms if room in ROOMS} - {own}


def test_every_room_has_a_rule() -> None:
    assert set(ROOMS) <= set(MAY_IMPORT)


def test_imports_run_one_way() -> None:
    """A file at the top of the package may import any room."""
    wrong = {
        f"{path.relative_to(ROOT)} imports {room}"
        for path in FILES
        if path.parent != PACKAGE
        for room in imported_rooms(path) - MAY_IMPORT[path.relative_to(PACKAGE).parts[0]]
    }
    assert not wrong


def test_systems_do_not_import_each_other() -> None:
    for system in SYSTEMS:
        for path in (PACKAGE / "modeling" / system).rglob("*.py"):
            for other in SYSTEMS - {system}:
                prefix = f"miti_detr.modeling.{other}"
                assert not any(name.startswith(prefix) for name in imported_names(path)), path


def test_nothing_imports_what_is_not_installed() -> None:
    for path in FILES:
        tops = {name.split(".")[0] for name in imported_names(path)}
        assert not tops & {"benchmarks", "tests", "tools", "train_net"}, path


def room_of(path: Path) -> str:
    """The room of a file: its folder. ``data/coco`` and ``data`` are two."""
    return path.parent.relative_to(PACKAGE).as_posix()


def test_rooms_files_and_functions_are_short() -> None:
    wrong, rooms = [], collections.Counter[str]()
    for path in FILES:
        text, name = path.read_text(), path.relative_to(PACKAGE).as_posix()
        lines = text.count("\n")
        if path.parent != PACKAGE:
            rooms[room_of(path)] += lines
        if lines > FILE_LINES:
            wrong.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES:
                    wrong.append(f"{name}: {node.name} has {length} lines")
    for room, lines in rooms.items():
        if lines > ROOM_LINES:
            wrong.append(f"{room}/: {lines} lines")
    assert not wrong


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        if "cli" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not wrong


def test_the_model_is_plain() -> None:
    """No kernels, private operators, layouts or class exchange in layers/ and modeling/."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for room in ("layers", "modeling")
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if KERNELS.search(line)
    ]
    assert not wrong


def test_layers_know_neither_detectron2_nor_configs() -> None:
    for path in (PACKAGE / "layers").rglob("*.py"):
        tops = {name.split(".")[0] for name in imported_names(path)}
        assert not tops & {"detectron2", "fvcore"}, path
        assert "miti_detr.config" not in imported_names(path)
