from pathlib import Path

import pytest

from miti_detr.yaml_files import parse_config, parse_yaml, read_config, read_yaml

BOMB = "a: &a [0,0,0,0,0,0,0,0,0,0]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.getcwd []", "1: the tag !!python/object/apply:os"),
        ("a: !!python/name:os.system", "builds a Python object"),
        ("a: !mine 3", "!mine"),
        ("a: 1\nb: {c: 1, c: 2}", "line 2: the key c appears twice"),
        ("a: 1\na: 1", "the key a appears twice"),
        ("[1]: 2", "a key must be text"),
        ("a: [1", "line 2"),
        ("a: 1\n---\nb: 2", "another document|single document"),
        ("[" * 5000, "nested too deeply|line"),
        ("a: &a [*a]", "nested too deeply|aliases"),
        (BOMB, "aliases expand to too many values"),
        ("a: !!timestamp x", "cannot be read"),
        ("a: 2026-99-99", "cannot be read"),
        ("a: \x00", "x.yaml"),
    ],
)  # fmt: skip
def test_faulty_yaml_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text, "x.yaml")
    assert str(error.value).startswith("x.yaml")
    assert "\n" not in str(error.value)


def test_aliases_and_merge_keys_are_plain_yaml() -> None:
    text = "base: &b {x: 1, y: 2}\nother: {<<: *b, y: 3}"
    assert parse_yaml(text, "x") == {"base": {"x": 1, "y": 2}, "other": {"x": 1, "y": 3}}


def test_keys_are_text() -> None:
    assert parse_yaml("5.5: 1\ntrue: 2\n2026-01-01: 3", "x.yaml") == {
        "5.5": 1,
        "true": 2,
        "2026-01-01": 3,
    }


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes("title: Größe".encode("utf-8-sig"))
    assert read_yaml(path) == {"title": "Größe"}


@pytest.mark.parametrize("content", ["a: ü".encode("utf-16"), b"\x89PNG\r\n\x1a\n\xff", b"\xff"])
def test_files_that_are_not_text_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.yaml is not text in UTF-8"):
        read_yaml(path)


def test_folders_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        read_yaml(tmp_path)
    with pytest.raises(ValueError, match="is not a file"):
        read_yaml("/dev/zero")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml does not exist"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("content", ["", "null", "3", "text", "[1, 2]"])
def test_a_config_is_a_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match="A config consists of lines such as"):
        read_config(path)


def test_bases_are_relative_and_overridden_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("A: {x: 1, y: 1}\nB: 1")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nA: {y: 2, z: 2}")
    (tmp_path / "c.yaml").write_text("B: 3")
    path = tmp_path / "sub" / "d.yaml"
    path.write_text("_BASE_: [../b.yaml, ../c.yaml]\nA: {z: 4}")
    assert read_config(path) == {"A": {"x": 1, "y": 2, "z": 4}, "B": 3}


@pytest.mark.parametrize(
    "base", ["http://127.0.0.1:9/a.yaml", "detectron2://a.yaml", "''", "3", "[[a.yaml]]", "null"]
)
def test_only_local_files_are_bases(tmp_path: Path, base: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"_BASE_: {base}")
    with pytest.raises(ValueError, match="Name a local file"):
        read_config(path)


def test_cycles_and_missing_bases_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("_BASE_: a.yaml")
    with pytest.raises(ValueError, match="leads back to the file itself"):
        read_config(path)
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml")
    path.write_text("_BASE_: b.yaml")
    with pytest.raises(ValueError, match="leads back to the file itself"):
        read_config(path)
    path.write_text("_BASE_: none.yaml")
    with pytest.raises(FileNotFoundError, match=r"a\.yaml: _BASE_: .*none\.yaml does not exist"):
        read_config(path)


def test_a_recorded_config_has_no_base() -> None:
    assert parse_config("SEED: 1", "the record") == {"SEED": 1}
    with pytest.raises(ValueError, match="the record names _BASE_"):
        parse_config("_BASE_: /etc/passwd", "the record")
    with pytest.raises(ValueError, match="the record is not text"):
        parse_config(["SEED: 1"], "the record")  # type: ignore[arg-type]
