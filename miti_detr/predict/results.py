"""Result files of a job: COCO, CSV, YOLO, lines of JSON."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from miti_detr.files import replacing, write_text
from miti_detr.visualize.classes import ClassTable

from .detections import Found, coco_results
from .journal import Entry
from .masks import run_lengths


class Image(NamedTuple):
    """An image, or a frame of a film, with its detections.

    Attributes:
        image_id: counts from 1.
        file_name: path as it was given.
        frame: index of the frame; None for an image.
        size: height and width in pixels.
        found: the detections.
        stem: name for a file about it.
    """

    image_id: int
    file_name: str
    frame: int | None
    size: tuple[int, int]
    found: Found
    stem: str

    @property
    def names(self) -> dict[str, Any]:
        """What the formats say about the image."""
        frame = {} if self.frame is None else {"frame": self.frame}
        return {"image_id": self.image_id, "file_name": self.file_name, **frame}


def to_entry(file: str, size: tuple[int, int], found: Found | Sequence[Found]) -> Entry:
    """Entry of a journal for an image, or for the frames of a film."""
    frames = [found] if isinstance(found, Found) else list(found)
    entry: Entry = {"file": file, "size": list(size), "film": not isinstance(found, Found)}
    entry["frames"] = [
        [
            [round(value, 3) for value in box] + [round(score, 5), label]
            for box, score, label in zip(
                one.boxes.tolist(), one.scores.tolist(), one.classes.tolist(), strict=True
            )
        ]
        for one in frames
    ]
    masks = [run_lengths(one.masks).tolist() for one in frames if one.masks is not None]
    return {**entry, "masks": masks} if masks else entry


def images_of(
    entries: Iterator[tuple[Entry, Path]],
) -> Iterator[Image]:
    """Number the images and frames of a job.

    Args:
        entries: in the order of the files, with the picture of each. A file that could not be
            used has a number, too.
    """
    image_id = 0
    for entry, picture in entries:
        for index, rows in enumerate(entry.get("frames", [])):
            image_id += 1
            table = np.array(rows, dtype=np.float64).reshape(-1, 6)
            found = Found(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))
            if "masks" in entry:
                found = found._replace(masks=np.array(entry["masks"][index], dtype=object))
            frame, stem = None, picture.stem
            if entry["film"]:
                frame, stem = index, f"{picture.stem}_{index:06d}"
            size = (entry["size"][0], entry["size"][1])
            yield Image(image_id, entry["file"], frame, size, found, stem)
        image_id += "error" in entry


def write_coco(images: Iterator[Image], classes: ClassTable, folder: Path) -> Path:
    """Write ``predictions.json``: a list in COCO's result format, with ``file_name``."""
    path = folder / "predictions.json"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        separator = ""
        for image in images:
            for result in coco_results(image.found, classes, **image.names):
                file.write(separator + json.dumps(result))
                separator = ",\n"
        file.write("]")
    return path


def write_lines(images: Iterator[Image], classes: ClassTable, folder: Path) -> Path:
    """Write ``predictions.jsonl``: one line for each image, with its size and detections."""
    path = folder / "predictions.jsonl"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for image in images:
            height, width = image.size
            results = coco_results(image.found, classes)
            for result, index in zip(results, image.found.classes.tolist(), strict=True):
                result["category"] = classes.names[index]
            line = {**image.names, "width": width, "height": height, "detections": results}
            file.write(json.dumps(line) + "\n")
    return path


def write_csv(images: Iterator[Image], classes: ClassTable, folder: Path) -> Path:
    """Write ``predictions.csv``: one row for each detection, boxes in pixels."""
    path = folder / "predictions.csv"
    header = ("image_id", "file_name", "frame", "category_id", "category", "score")
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "x", "y", "width", "height"])
        for image in images:
            results = coco_results(image.found, classes)
            for result, index in zip(results, image.found.classes.tolist(), strict=True):
                frame = "" if image.frame is None else image.frame
                names = (image.image_id, image.file_name, frame)
                category = (result["category_id"], classes.names[index], result["score"])
                writer.writerow([*names, *category, *result["bbox"]])
    return path


def write_yolo(images: Iterator[Image], classes: ClassTable, folder: Path) -> Path:
    """Write ``labels/NAME.txt`` with class, centre, size (of 1) and score, and ``classes.txt``."""
    labels = folder / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    for image in images:
        scale = np.array([image.size[1], image.size[0]] * 2)
        low, high = np.split(image.found.boxes / scale, 2, axis=1)
        rows = np.concatenate([(low + high) / 2, high - low, image.found.scores[:, None]], axis=1)
        lines = [
            " ".join([str(label), *(f"{value:.6f}" for value in row)])
            for label, row in zip(image.found.classes.tolist(), rows.tolist(), strict=True)
        ]
        write_text(labels / f"{image.stem}.txt", "".join(f"{line}\n" for line in lines))
    write_text(folder / "classes.txt", "".join(f"{name}\n" for name in classes.names))
    return labels


WRITERS: dict[str, Callable[[Iterator[Image], ClassTable, Path], Path]] = {
    "coco": write_coco,
    "csv": write_csv,
    "yolo": write_yolo,
    "jsonl": write_lines,
}
