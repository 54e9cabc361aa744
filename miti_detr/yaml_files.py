"""Reading YAML as data: nothing in a file runs code or reaches the network."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.file_io import PathManager

BASE_KEY = "_BASE_"  # names the config files that a config file builds on, as in Detectron2
_LARGEST_FILE = 2**22  # bytes
_LARGEST_CONTENT = 100_000  # values, after aliases are expanded
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "null", "timestamp")}
_PYTHON_TAG = "tag:yaml.org,2002:python/"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, which refuses repeated keys and takes each key as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Build a dict, after a look at its keys."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be text", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} appears twice", key.start_mark
                )
            seen.add(key.value)
            if key.tag in _SCALARS:  # the key 5.5 is a name
                key.tag = "tag:yaml.org,2002:str"
        content: dict[str, Any] = super().construct_mapping(node, deep)
        return content


def parse_yaml(text: str, name: str) -> Any:
    """Parse YAML that may hold plain values only.

    Args:
        text: one YAML document.
        name: of its origin, for messages.

    Raises:
        ValueError: it is not valid YAML, repeats a key, or holds a tag that builds a Python object.
    """
    try:
        content = yaml.load(text, _Loader)  # a subclass of the safe loader
        _measure(content, _LARGEST_CONTENT)
    except yaml.YAMLError as error:
        raise ValueError(_one_line(error, name)) from error
    except RecursionError as error:
        raise ValueError(f"{name}: the YAML is nested too deeply. Simplify it.") from error
    except Exception as error:  # PyYAML raises all kinds for values such as `!!timestamp x`
        raise ValueError(f"{name}: the YAML cannot be read ({error}). Correct it.") from error
    return content


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file that may hold plain values only.

    Args:
        path: local file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a text file, or see :func:`parse_yaml`.
    """
    return parse_yaml(_read_text(os.fspath(path)), os.fspath(path))


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a config file and the files that it builds on.

    ``_BASE_`` names one file or a list of files, relative to the file that names them. They must be
    local.

    Args:
        path: local file, or an address that Detectron2's ``PathManager`` knows.

    Returns:
        Nested keys and values; those of a file override those of its bases.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: see :func:`read_yaml`; a file is not a mapping, or is its own base.
    """
    return _read_config(os.fspath(path), ())


def parse_config(text: str, name: str) -> dict[str, Any]:
    """Parse a config that was recorded as text; it is complete and must not have a ``_BASE_``.

    Args:
        text: YAML.
        name: of its origin, for messages.

    Raises:
        ValueError: see :func:`parse_yaml`; it is not a mapping, or names a base.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is not text. Give the YAML file with --config-file.")
    content = _mapping(parse_yaml(text, name), name)
    if BASE_KEY in content:
        raise ValueError(f"{name} names {BASE_KEY}, which only config files may. Remove it.")
    return content


def _read_config(path: str, children: tuple[str, ...]) -> dict[str, Any]:
    own = os.path.realpath(path)
    if own in children:
        raise ValueError(f"{path}: {BASE_KEY} leads back to the file itself. Remove the cycle.")
    content = _mapping(parse_yaml(_read_text(path, "config file"), path), path)
    bases = content.pop(BASE_KEY, [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not base or "://" in base or "://" in path:
            raise ValueError(f"{path}: {BASE_KEY} is {base!r}. Name a local file.")
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        try:
            _merge(merged, _read_config(base, (*children, own)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: {BASE_KEY}: {error}") from error
    _merge(merged, content)
    return merged


def _merge(target: dict[str, Any], content: dict[str, Any]) -> None:
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _mapping(content: Any, name: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{name} is {found}. A config consists of lines such as `SEED: 1`.")
    return content


def _read_text(path: str, kind: str = "file") -> str:
    local = path
    if "://" in path:
        local = PathManager.get_local_path(path)
    if not os.path.exists(local):
        raise FileNotFoundError(f"the {kind} {path} does not exist")
    if not os.path.isfile(local):
        raise ValueError(f"{path} is not a file. Name a YAML file.")
    if os.path.getsize(local) > _LARGEST_FILE:
        raise ValueError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB. Name a YAML file.")
    try:
        return Path(local).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8. Save it as UTF-8.") from error


def _measure(content: Any, budget: int) -> int:
    """Return the rest of ``budget``; aliases can expand a short file exponentially."""
    budget -= 1
    if budget < 0:
        raise ValueError("its aliases expand to too many values")
    if isinstance(content, dict):
        for value in content.values():
            budget = _measure(value, budget)
    elif isinstance(content, list):
        for value in content:
            budget = _measure(value, budget)
    return budget


def _one_line(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{name}, line {mark.line + 1}" if mark else name
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if (start := problem.find(_PYTHON_TAG)) >= 0:
        tag = problem[start:].strip("'").replace("tag:yaml.org,2002:", "!!")
        return f"{place}: the tag {tag} builds a Python object. Only plain values are allowed."
    return f"{place}: {problem}. Correct the YAML."


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as a flat one, with keys joined by dots."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result
