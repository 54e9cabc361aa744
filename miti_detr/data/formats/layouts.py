"""Which kind of labelled data a folder or file holds, and where its parts are."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from miti_detr.data.coco.structure import read_coco_json

from .record import LabelledImage
from .voc import read_files
from .yolo import is_yolo, read_names, read_part

Read = Callable[[], list[LabelledImage]]
_TRAIN, _VAL = ("train", "training"), ("valid", "val", "validation")
_EXPECTED = (
    "COCO JSON (train.json, annotations/instances_train*.json, train/_annotations.coco.json or one "
    "other file), YOLO (data.yaml) or Pascal VOC (XML files in Annotations/, train/ or the folder)"
)


@dataclass(frozen=True)
class Found:
    """Labelled data.

    Attributes:
        kind: ``COCO``, ``YOLO`` or ``Pascal VOC``.
        root: folder of the data.
        labels: files that the result depends on.
        train: a COCO JSON file, or reads the training images.
        val: the same for validation; None: there is no such part.
        classes: names, in the order of their indices; None: to be collected.
    """

    kind: str
    root: Path
    labels: tuple[Path, ...]
    train: Path | Read
    val: Path | Read | None
    classes: tuple[str, ...] | None = None


def find_data(path: Path) -> Found:
    """Recognise labelled data.

    Args:
        path: a folder, a COCO JSON file, or a ``data.yaml`` of YOLO.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds none of the known kinds, or more than one.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    path = path.resolve()
    if path.is_file():
        if path.suffix == ".json":
            return Found("COCO", path.parent, (path,), path, None)
        if path.suffix in (".yaml", ".yml") and is_yolo(path):
            return _yolo(path)
        raise ValueError(f"{path} is neither a COCO JSON file nor a data.yaml of YOLO")
    found = [each for look in (_coco, _yolo_in, _voc) if (each := look(path)) is not None]
    if not found:
        raise ValueError(f"{path} holds no labelled data that is known: {_EXPECTED}")
    if len(found) > 1:
        kinds = " and ".join(each.kind for each in found)
        raise ValueError(f"{path} holds {kinds}. Name the JSON or YAML file, or another folder")
    return found[0]


def image_root(file: Path) -> Path:
    """Folder in which the images of a COCO JSON file are.

    Raises:
        ValueError: the file is not valid, or its images are in none of the usual folders.
    """
    images = read_coco_json(file)["images"]
    name = str(images[0]["file_name"]).replace("\\", "/") if images else ""
    part = file.stem.removeprefix("instances_")
    folders = [
        folder / below
        for folder in (file.parent, file.parent.parent)
        for below in (".", "images", part, f"images/{part}", "data")
    ]
    for folder in folders:
        if (folder / name).exists():
            return folder
    raise ValueError(
        f"{file}: its image {name} is not in {folders[0]} or {folders[1]}. Put the images there"
    )


def _first(folder: Path, patterns: list[str]) -> Path | None:
    return next((path for p in patterns for path in sorted(folder.glob(p))), None)


def _coco(folder: Path) -> Found | None:
    def part(names: tuple[str, ...]) -> Path | None:
        """The file of a part under its usual names."""
        patterns = ("{}/_annotations.coco.json", "{}.json", "instances_{}*.json")
        places = [*patterns, *(f"annotations/{p}" for p in patterns[1:])]
        return _first(folder, [p.format(name) for p in places for name in names])

    train, val = part(_TRAIN), part(_VAL)
    if train is None:
        single = sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")])
        if len(single) != 1:
            return None
        train, val = single[0], None
    return Found("COCO", folder, tuple(filter(None, (train, val))), train, val)


def _yolo_in(folder: Path) -> Found | None:
    files = [f for f in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if is_yolo(f)]
    return _yolo(files[0]) if files else None


def _yolo(file: Path) -> Found:
    labels = (file, *sorted(file.parent.rglob("*.txt")))

    def read(part: str) -> list[LabelledImage] | None:
        """Read a part; the first name of the validation part that is there."""
        names = ("val", "valid") if part == "val" else (part,)
        return next((found for n in names if (found := read_part(file, n)) is not None), None)

    has_val = any(f"{name}:" in file.read_text(encoding="utf-8") for name in ("val", "valid"))
    return Found(
        "YOLO",
        file.parent,
        labels,
        lambda: read("train") or [],
        (lambda: read("val") or []) if has_val else None,
        tuple(read_names(file)),
    )


def _voc(folder: Path) -> Found | None:
    parts: dict[str, list[Path]] = {}
    for names in (_TRAIN, _VAL):
        for name in names:
            if files := sorted((folder / name).glob("*.xml")):
                parts[names[0]] = files
    whole = sorted(folder.glob("Annotations/*.xml")) or sorted(folder.glob("*.xml"))
    if not parts and not whole:
        return None
    if not parts:
        parts = _listed(folder, whole)
    train, val = parts.get(_TRAIN[0], []), parts.get(_VAL[0])

    def reader(files: list[Path]) -> Read:
        """Read these files, whose images are beside them or in a folder of images."""
        beside = files[0].parent if files else folder
        return lambda: read_files(files, [folder / "JPEGImages", folder / "images", beside])

    labels = (*train, *(val or ()))
    return Found("Pascal VOC", folder, labels, reader(train), reader(val) if val else None)


def _listed(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Divide XML files by ``ImageSets/Main/{train,val}.txt``, if it is there."""
    lists = folder / "ImageSets" / "Main"
    parts = {}
    for part, name in ((_TRAIN[0], "train"), (_VAL[0], "val")):
        if (lists / f"{name}.txt").is_file():
            lines = (lists / f"{name}.txt").read_text(encoding="utf-8").splitlines()
            stems = {line.split()[0] for line in lines if line.strip()}
            parts[part] = [file for file in files if file.stem in stems]
    return parts if parts.get(_TRAIN[0]) else {_TRAIN[0]: files}
