"""Merging of values into a config, with errors that name the key."""

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from miti_detr.checks import shown


def merge_content(cfg: CfgNode, content: Mapping[str, Any], source: str) -> None:
    """Set the keys that a config file names.

    Text is read as a Python literal where it is one, as in Detectron2: ``"(1, 2)"`` is a tuple.

    Args:
        cfg: changed in place.
        content: nested keys and values.
        source: name of the file, for messages.

    Raises:
        ValueError: a key is unknown, or its value has the wrong type.
    """
    try:
        _check_version(content.get("VERSION", cfg.VERSION))
        for key, value in _leaves(content, cfg):
            _set(cfg, key, value)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def merge_options(cfg: CfgNode, options: Sequence[Any]) -> None:
    """Set the keys of a command line.

    Args:
        cfg: changed in place.
        options: alternating keys and values.

    Raises:
        ValueError: a key is unknown or has no value, or the value has the wrong type.
    """
    if len(options) % 2:
        raise ValueError(f"overrides come as KEY VALUE pairs; {options[-1]!r} has no value")
    for key, value in zip(options[::2], options[1::2], strict=True):
        _set(cfg, str(key), value)


def _leaves(
    content: Mapping[str, Any], node: CfgNode, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        inner = node.get(name)
        if isinstance(value, dict) and isinstance(inner, CfgNode):
            yield from _leaves(value, inner, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    node: Any = cfg
    *path, name = key.split(".")
    for part in path:
        node = node.get(part) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or (name not in node and not node.is_new_allowed()):
        raise ValueError(_unknown_key(key, cfg))
    if name not in node:
        node[name] = _literal(value)
        return
    if isinstance(node[name], CfgNode):
        raise ValueError(f"{key} is a section and cannot be {shown(value)}. Set the keys below it.")
    node[name] = _as_type_of(node[name], value, key)


def _as_type_of(old: Any, value: Any, key: str) -> Any:
    """Return ``value`` in the type of ``old``, where that loses nothing."""
    found = _literal(value)
    if isinstance(old, str) and isinstance(value, str) and not isinstance(found, str):
        found = value  # a name that looks like a number
    if old is None or type(found) is type(old):
        return found
    if isinstance(old, float) and isinstance(found, int) and not isinstance(found, bool):
        try:
            return float(found)
        except OverflowError as error:
            raise ValueError(f"{key} is {shown(found)}. Give a smaller number.") from error
    if isinstance(old, list | tuple) and isinstance(found, list | tuple):
        return type(old)(found)
    kind = {"str": "text", "NoneType": "null"}.get(type(old).__name__, type(old).__name__)
    raise ValueError(f"{key} is {shown(found)}; its type must be {kind}, as in {shown(old)}")


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _check_version(version: Any) -> None:
    if version != 2:
        raise ValueError(f"VERSION is {shown(version)}. Update the config to VERSION 2.")


def _unknown_key(key: str, cfg: CfgNode) -> str:
    close = difflib.get_close_matches(key, sorted(_keys(cfg)), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown config key {shown(key)[1:-1]}{hint}"


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
