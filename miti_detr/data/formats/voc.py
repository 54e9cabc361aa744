"""Pascal VOC: an XML file for each image.

Corners are pixels counted from 1, and the last one belongs to the box, as in the devkit and in
Detectron2's ``datasets/pascal_voc.py``. Objects marked as difficult become crowds, which are
neither trained nor counted.
"""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from miti_detr.data.images import image_size
from miti_detr.pictures import IMAGE_SUFFIXES

from .record import LabelledImage, annotation


def read_files(files: list[Path], image_folders: list[Path]) -> list[LabelledImage]:
    """Read XML files.

    Args:
        files: of the labels.
        image_folders: where the images are.

    Raises:
        ValueError: a file is faulty.
        OSError: an image is missing or cannot be read.
    """
    return [_read(file, image_folders) for file in files]


def _read(file: Path, image_folders: list[Path]) -> LabelledImage:
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{file} is not XML: {error}") from error
    path = _image_of(file, (root.findtext("filename") or "").strip(), image_folders)
    objects = [_object(element, file) for element in root.iter("object")]
    return LabelledImage(path, image_size(path), objects)


def _image_of(file: Path, name: str, folders: list[Path]) -> Path:
    names = [Path(name.replace("\\", "/")).name] if name else []
    names += [file.stem + suffix for suffix in IMAGE_SUFFIXES]
    for folder in folders:
        for each in names:
            if (folder / each).is_file():
                return folder / each
    raise FileNotFoundError(f"{file}: its image {names[0]} is not in {folders[0]}")


def _object(element: ElementTree.Element, file: Path) -> dict[str, Any]:
    name = (element.findtext("name") or "").strip()
    box = element.find("bndbox")
    if not name or box is None:
        raise ValueError(f"{file}: an object needs a name and a bndbox")
    try:
        x0, y0, x1, y1 = (float(box.findtext(k) or "") for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise ValueError(f"{file}: the bndbox of {name!r} needs four numbers") from error
    difficult = (element.findtext("difficult") or "0").strip() == "1"
    return annotation(name, (x0 - 1, y0 - 1, x1, y1), iscrowd=int(difficult))
