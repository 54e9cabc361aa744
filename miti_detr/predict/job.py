"""Prediction on many files: pictures with boxes and result files, resumable after a kill."""

import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miti_detr.files import replacing, write_text
from miti_detr.pictures import ImageError
from miti_detr.visualize.drawing import resize_for_reading

from .background import in_background
from .detections import Result
from .films import predict_film
from .journal import Entry, Journal
from .predictor import DetectionPredictor, ReadImage
from .results import WRITERS, Image, images_of, to_entry
from .sources import is_film

logger = logging.getLogger(__name__)

# Smaller pictures are enlarged to this longest side (pixels), because labels need room.
READABLE_SIZE = 320
JOURNAL = ".predictions.jsonl"
ERRORS = "errors.txt"
_CHUNK = 8  # batches that are read together

Failure = tuple[int, str]


@dataclass
class Summary:
    """What a job has done.

    Attributes:
        output: the result file, or folder.
        done: number of files with a result, those of earlier attempts as well.
        resumed: number of files that earlier attempts had done.
        detections: their number.
        failed: (file, reason) for each file that could not be used.
    """

    output: Path
    done: int = 0
    resumed: int = 0
    detections: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)


def predict_files(
    predictor: DetectionPredictor,
    files: Sequence[Path],
    output_dir: Path,
    *,
    format: str = "coco",
    draw: bool = True,
    settings: Mapping[str, Any] | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Summary:
    """Predict image and film files, and write pictures and a result file.

    A job that was killed continues where it was when it is started again; what it has done is in
    a journal in the folder. Files are read, detected, and drawn at the same time.

    Args:
        predictor: the model.
        files: those that cannot be used are reported, and tried again by the next attempt.
        output_dir: folder of the results, made if missing.
        format: ``coco``, ``csv``, ``yolo`` or ``jsonl``, see :mod:`.results`.
        draw: write a picture or film of each file.
        settings: of the job; an attempt with others does not continue it.
        advance: called with the number of files processed since the last call, first with those
            of earlier attempts.

    Returns:
        Numbers and failures.

    Raises:
        BlockingIOError: another process predicts into the folder.
        ValueError: the format is unknown, a picture would replace one of the files, or the folder
            has an unfinished job with other settings.
    """
    if format not in WRITERS:
        raise ValueError(f"format is {format!r}. Use {', '.join(WRITERS)}.")
    pictures = picture_paths(files, output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with Journal(output_dir / JOURNAL, {"pictures": draw, **(settings or {})}) as journal:
        todo = [index for index, file in enumerate(files) if str(file) not in journal]
        resumed = len(files) - len(todo)
        advance(resumed)
        for entries in _entries(predictor, files, pictures if draw else None, todo):
            journal.add(entries)
            advance(len(entries))
        summary = _finish(predictor, files, pictures, journal, output_dir, format)
        summary.resumed = resumed
        journal.remove()
    return summary


def picture_paths(files: Sequence[Path], output_dir: Path) -> list[Path]:
    """Choose the picture of each file: the name of its image, numbered if names are repeated.

    JPEG images give JPEG pictures, films MP4 films; all others give PNG.

    Raises:
        ValueError: a picture would replace one of the files.
    """
    taken: set[str] = set()
    chosen = []
    for file in files:
        suffix = file.suffix if file.suffix.lower() in {".jpg", ".jpeg", ".png"} else ".png"
        suffix = ".mp4" if is_film(file) else suffix
        name, number = f"{file.stem}{suffix}", 1
        while name.lower() in taken:
            number += 1
            name = f"{file.stem}_{number}{suffix}"
        taken.add(name.lower())
        chosen.append(output_dir / name)
    here = os.path.realpath(output_dir)
    folders = {file.parent for file in files}
    same = {folder for folder in folders if os.path.realpath(folder) == here}
    sources = {file.name for file in files if file.parent in same}
    for path in chosen:
        if path.name in sources:
            raise ValueError(f"{path} is one of the images. Choose another output folder")
    return chosen


def _entries(
    predictor: DetectionPredictor,
    files: Sequence[Path],
    pictures: Sequence[Path] | None,
    todo: Sequence[int],
) -> Iterator[list[Entry]]:
    """Process files, and yield what the journal notes of them."""
    for film, group in itertools.groupby(todo, key=lambda index: is_film(files[index])):
        if film:
            for index in group:
                target = None if pictures is None else pictures[index]
                yield [_film_entry(predictor, files[index], target)]
            continue
        parts = _chunks(group, _CHUNK * predictor.batch_size)
        read = in_background((_read(predictor, files, part) for part in parts), 1)
        for results, failures in in_background((_detect(predictor, part) for part in read), 1):
            entries = [_error_entry(files[index], reason) for index, reason in failures]
            for index, result in results:
                if pictures is not None:
                    _save_picture(result, pictures[index])
                entries.append(to_entry(str(files[index]), result.image_size, result.found()))
            yield entries


def _chunks(indices: Iterator[int], size: int) -> Iterator[list[int]]:
    while part := list(itertools.islice(indices, size)):
        yield part


def _read(
    predictor: DetectionPredictor, files: Sequence[Path], part: Sequence[int]
) -> tuple[list[tuple[int, ReadImage]], list[Failure]]:
    images, failures = [], []
    for index in part:
        try:
            images.append((index, predictor.read(files[index])))
        except ImageError as error:
            failures.append((index, str(error)))
    return images, failures


def _detect(
    predictor: DetectionPredictor, part: tuple[list[tuple[int, ReadImage]], list[Failure]]
) -> tuple[list[tuple[int, Any]], list[Failure]]:
    images, failures = part
    try:
        results = predictor.detect([image for _, image in images])
        return list(zip([index for index, _ in images], results, strict=True)), failures
    except ValueError as error:  # which image it is, the error need not say
        if len(images) == 1:
            return [], [*failures, (images[0][0], str(error))]
    single = [_detect(predictor, ([one], [])) for one in images]
    return (
        [result for results, _ in single for result in results],
        [*failures, *(failure for _, failed in single for failure in failed)],
    )


def _film_entry(predictor: DetectionPredictor, file: Path, target: Path | None) -> Entry:
    try:
        if target is None:
            size, found = predict_film(predictor, file, None)
        else:
            with replacing(target) as temporary:
                size, found = predict_film(predictor, file, temporary)
    except ImageError as error:
        return _error_entry(file, str(error))
    return to_entry(str(file), size, found)


def _error_entry(file: Path, reason: str) -> Entry:
    logger.info("failed: %s", reason)
    return {"file": str(file), "error": reason}


def _save_picture(result: Result, path: Path) -> None:
    picture, _ = resize_for_reading(result.picture(), READABLE_SIZE, shrink=False)
    with replacing(path) as temporary:
        result.draw_on(picture).save(temporary, quality=92)


def _finish(
    predictor: DetectionPredictor,
    files: Sequence[Path],
    pictures: Sequence[Path],
    journal: Journal,
    folder: Path,
    format: str,
) -> Summary:
    """Write the result file from the journal, in the order of the files."""
    summary = Summary(output=folder)

    def entries() -> Iterator[tuple[Entry, Path]]:
        for file, picture in zip(files, pictures, strict=True):
            entry = journal.entry(str(file))
            if "error" in entry:
                summary.failed.append((str(file), entry["error"]))
            else:
                summary.done += 1
                summary.detections += sum(map(len, entry["frames"]))
            yield entry, picture

    images: Iterator[Image] = images_of(entries())
    summary.output = WRITERS[format](images, predictor.backend.classes, folder)
    if summary.failed:
        lines = [f"{file}: {reason}\n" for file, reason in summary.failed]
        write_text(folder / ERRORS, "".join(lines))
    else:
        (folder / ERRORS).unlink(missing_ok=True)
    return summary
