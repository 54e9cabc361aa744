"""Reading a file in COCO format and checking its structure."""

import json
from collections import Counter
from numbers import Real
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathManager

_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")

_TOO_LARGE = 10**9  # pixels along a side


def read_coco_json(path: str | Path, repairs: Counter[str] | None = None) -> dict[str, Any]:
    """Read a file in COCO format and check its structure.

    ``images`` and ``categories`` are lists of objects with the fields that cannot be guessed.
    ``annotations`` is a list of objects, or is missing (test sets without published annotations).

    Args:
        path: UTF-8 with or without a byte order mark; UTF-16 and UTF-32 are read as well.
        repairs: counts what has to be repaired; changed in place.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, or a required field is missing; with the place.
    """
    repairs = Counter() if repairs is None else repairs
    try:
        local = Path(PathManager.get_local_path(str(path)))
        if local.exists() and not local.is_file():  # reading a named pipe would block
            raise OSError("it is not a regular file")
        data = local.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"The annotation file {path} does not exist") from error
    except OSError as error:
        raise OSError(f"The annotation file {path} cannot be read: {error}") from error
    content = _parse(path, data)
    if data.startswith(_BYTE_ORDER_MARKS) or json.detect_encoding(data[:4]) != "utf-8":
        repairs["file encoding"] += 1  # pycocotools reads UTF-8 without a byte order mark only
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not in COCO format: it holds a {type(content).__name__}")
    for key, fields in (
        ("images", ("id", "file_name", "width", "height")),
        ("categories", ("id", "name")),
        ("annotations", ()),
    ):
        if key in content or key != "annotations":
            _check_records(path, content, key, fields)
    _repair_image_sizes(path, content["images"], repairs)
    _repair_names(path, content, repairs)
    return content


def _parse(path: str | Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is broken JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:  # encodings, very long numbers, deep nesting
        raise ValueError(f"{path} cannot be read as JSON: {str(error).splitlines()[0]}") from error


def _check_records(
    path: str | Path, content: dict[str, Any], key: str, fields: tuple[str, ...]
) -> None:
    """Check that a list of objects is present and has the required fields."""
    records = content.get(key)
    if not isinstance(records, list):
        raise ValueError(f"{path} is not in COCO format: it has no list '{key}'")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: entry {i} of '{key}' is not an object: {record!r:.100}")
        for field in fields:
            if field not in record:
                raise ValueError(f"{path}: entry {i} of '{key}' has no '{field}': {record!r:.200}")


def _repair_image_sizes(
    path: str | Path, images: list[dict[str, Any]], repairs: Counter[str]
) -> None:
    for image in images:
        for field in ("width", "height"):
            value = image[field]
            if type(value) is int and 0 < value < _TOO_LARGE:
                continue
            number = to_number(value)
            if not (0 < number < _TOO_LARGE and number.is_integer()):
                raise ValueError(
                    f"{path}: image {image['id']!r:.50} has no valid width and height: "
                    f"'{field}' is {value!r:.50}. Both must be positive integers"
                )
            image[field] = int(number)
            repairs[f"image {field}"] += 1


def _repair_names(path: str | Path, content: dict[str, Any], repairs: Counter[str]) -> None:
    for image in content["images"]:
        if not isinstance(image["file_name"], str) or not image["file_name"]:
            raise ValueError(
                f"{path}: image {image['id']!r:.50} has the 'file_name' "
                f"{image['file_name']!r:.50}. It must be the name of a file"
            )
    for category in content["categories"]:
        name = category["name"]
        if type(name) in (int, float):
            category["name"] = str(name)
            repairs["category name"] += 1
        elif not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{path}: category {category['id']!r:.50} has the 'name' {name!r:.50}. "
                "It must be a text"
            )


def to_number(value: Any) -> float:
    """A JSON value as a float; NaN if it is neither a number nor the text of one."""
    if isinstance(value, bool) or not isinstance(value, Real | str):
        return float("nan")
    try:
        return float(value)
    except OverflowError:  # an integer beyond 1e308
        return float("inf")
    except ValueError:
        return float("nan")
