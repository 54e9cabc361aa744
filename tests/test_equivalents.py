"""Commands and keys in the tables of docs/coming_from.md and in docs/gallery.md."""

import pydoc
import re
import shlex

import pytest

from tests.helpers import ROOT
from tests.test_docs import check_overrides, default_config, steps_of, train_net_steps


def code_of(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def equivalents() -> list[str]:
    """The code in the last columns of the tables."""
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs/coming_from.md").read_text(), re.MULTILINE)
    return [code for row in rows for code in code_of(row.split("|")[-2])]


def check_code(code: str) -> None:
    """Check a key, a key with its value, an option, a Python name, a config or a command."""
    words = shlex.split(code)
    if words[0].startswith("--"):
        train_net_steps(["--config-file", "CONFIG", *words])
    elif words[0].startswith("miti_detr."):
        assert pydoc.locate(code) is not None, code
    elif words[0].startswith("configs/"):
        assert (ROOT / code).is_file(), code
    elif not words[0].isupper():
        steps_of(words)
    elif len(words) > 1:
        check_overrides(words, "")
    else:
        section = default_config()
        for name in code.split("."):
            assert name in section, code
            section = section[name]


@pytest.mark.parametrize("code", sorted(set(equivalents())))
def test_equivalents_exist(code: str) -> None:
    check_code(code)


@pytest.mark.parametrize("code", ["SOLVER.LR", "SOLVER.LR 1", "--lr 1", "lr", "miti_detr.Detr"])
def test_what_does_not_exist_is_found(code: str) -> None:
    with pytest.raises((AssertionError, KeyError, SystemExit)):
        check_code(code)


def test_gallery_has_all_pictures_and_commands_that_parse() -> None:
    text = (ROOT / "docs/gallery.md").read_text()
    pictures = {path.name for path in (ROOT / "docs").glob("*.png")}
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == pictures
    commands = [code for code in code_of(text) if " " in code]
    assert len(commands) >= 6
    for command in commands:
        steps_of(shlex.split(command))
