"""YOLO: a ``data.yaml`` with names and folders, and a text file for each image.

A row is ``class x y width height``, relative to the image, with the centre of the box; or
``class x1 y1 x2 y2 ...`` with the corners of a polygon. An image without a text file, or with an
empty one, has no objects. Source: docs.ultralytics.com/datasets.
"""

from pathlib import Path
from typing import Any

from miti_detr.data.images import image_size
from miti_detr.pictures import IMAGE_SUFFIXES
from miti_detr.yaml_files import read_yaml

from .record import LabelledImage, annotation


def read_names(file: Path) -> list[str]:
    """Names of the classes in a ``data.yaml``.

    Raises:
        ValueError: there are none.
    """
    names = _content(file).get("names")
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=lambda key: int(key))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{file}: 'names' must list the names of the classes")
    return [str(name) for name in names]


def is_yolo(file: Path) -> bool:
    """Say whether a YAML file describes a data set."""
    try:
        content = read_yaml(str(file))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "names" in content and "train" in content


def read_part(file: Path, part: str) -> list[LabelledImage] | None:
    """Read the images that ``train`` or ``val`` of a ``data.yaml`` names; None: it names none.

    Raises:
        ValueError: a label file is faulty, with its line.
        OSError: a folder or an image cannot be read.
    """
    value = _content(file).get(part)
    if not value:
        return None
    names = read_names(file)
    places = value if isinstance(value, list) else [value]
    images = [image for place in places for image in _images(_resolve(file, str(place)))]
    return [_read(path, names) for path in images]


def _content(file: Path) -> dict[str, Any]:
    content = read_yaml(str(file))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a data.yaml: it must have 'names', 'train' and 'val'")
    return content


def _resolve(file: Path, place: str) -> Path:
    """A path of a ``data.yaml``; Roboflow writes ``../train/images`` for ``train/images``."""
    roots = [file.parent / str(_content(file).get("path") or "."), file.parent]
    tried = [root / name for root in roots for name in (place, place.removeprefix("../"))]
    for path in tried:
        if path.exists():
            return path
    raise FileNotFoundError(f"{file} names {place}, but there is no {tried[0]}")


def _images(place: Path) -> list[Path]:
    if place.is_file():  # a list of images
        lines = place.read_text(encoding="utf-8").splitlines()
        return [place.parent / line.strip() for line in lines if line.strip()]
    return sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def _read(path: Path, names: list[str]) -> LabelledImage:
    image = LabelledImage(path, image_size(path))
    labels = _label_file(path)
    if labels.is_file():
        for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                image.objects.append(_object(line, names, image.size, f"{labels}, line {number}"))
    return image


def _label_file(image: Path) -> Path:
    """The text file in ``labels`` for an image in ``images``, or beside it."""
    parts = list(image.parts)
    if "images" in parts:
        last = len(parts) - 1 - parts[::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _object(line: str, names: list[str], size: tuple[int, int], place: str) -> dict[str, Any]:
    try:
        label, *numbers = (float(word) for word in line.split())
    except ValueError as error:
        raise ValueError(f"{place}: {line.strip()!r} is not a row of numbers") from error
    if label not in range(len(names)):
        raise ValueError(f"{place}: class {label:g} is not one of the {len(names)} classes")
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(
            f"{place}: a row has a class and 4 numbers for a box, or an even number of at least 6 "
            f"for a polygon, not {len(numbers)}"
        )
    width, height = size
    name = names[int(label)]
    if len(numbers) == 4:
        x, y, w, h = (n * side for n, side in zip(numbers, (width, height) * 2, strict=True))
        return annotation(name, (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    polygon = [n * side for n, side in zip(numbers, (width, height) * 100_000, strict=False)]
    xs, ys = polygon[::2], polygon[1::2]
    return annotation(name, (min(xs), min(ys), max(xs), max(ys)), segmentation=[polygon])
