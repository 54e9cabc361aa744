"""The report of a model: one self-contained page, and the same as CSV and JSON."""

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from miti_detr.data import read_image
from miti_detr.predict.predictor import DetectionPredictor

from .arrays import Detections, Truth
from .bootstrap import resample
from .evaluation import Evaluation, evaluate
from .figures import draw_figures, make_curves
from .page import Cell, Section, Table, section_json, write_page
from .predictions import detect_all
from .tables import (
    DEFAULT,
    calibration_table,
    class_table,
    coco_table,
    difference_table,
    error_table,
    group_table,
    threshold_table,
)
from .thresholds import curve_of, operate, verified_images
from .worst import WorstImage, draw_worst


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Attributes:
        title: of the page.
        names: of the model and of the one it is compared with.
        command: that writes the report, shown in it.
        pictures: largest number of images that are drawn.
        resamples: number of resamples for intervals.
        seed: of the halves and the resamples.
    """

    title: str
    names: tuple[str, str] = ("model", "other")
    command: str = "miti-detr report"
    pictures: int = 12
    resamples: int = 1000
    seed: int = 0


def report_model(
    predictor: DetectionPredictor,
    truth: Truth,
    output: Path,
    options: ReportOptions,
    *,
    against: DetectionPredictor | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Evaluate a model and write ``report.html``, ``report.json``, ``report.csv`` and pictures.

    Args:
        predictor: the model, with the threshold 0.
        truth: the data set.
        output: folder.
        options: what is shown.
        against: another model, for the difference of AP.
        advance: called with the number of images that a model has seen.

    Raises:
        ImageError: an image cannot be read.
        ValueError: as :func:`~miti_detr.report.predictions.detect_all`.
    """
    detections = detect_all(predictor, truth, advance=advance)
    other = None if against is None else detect_all(against, truth, advance=advance)

    def read(path: str) -> Image.Image:
        return Image.fromarray(read_image(path, "RGB", predictor.backend.orientation))

    return write_report(truth, detections, output, options, other=other, read=read)


def write_report(
    truth: Truth,
    detections: Detections,
    output: Path,
    options: ReportOptions,
    *,
    other: Detections | None = None,
    read: Callable[[str], Image.Image],
) -> Evaluation:
    """Write the report of detections; arguments as for :func:`report_model`."""
    found = [evaluate(truth, d, seed=options.seed) for d in (detections, other) if d is not None]
    evaluation = found[0]
    samples = resample(
        [one.counter for one in found],
        len(truth.files),
        resamples=options.resamples,
        seed=options.seed,
    )
    curves = make_curves(evaluation)
    figures = draw_figures(evaluation, curves, output / "figures")
    worst = draw_worst(evaluation, read, output / "pictures", options.pictures)
    difference = []
    if len(found) == 2:
        difference = [difference_table(options.names, (found[0], found[1]), samples)]
    sections = [
        Section("Accuracy", [coco_table(evaluation, samples[0]), *difference], []),
        Section("Classes", [class_table(evaluation, samples[0])], []),
        Section("Threshold", [_threshold_table(evaluation, options)], figures[:2]),
        Section("Calibration", [calibration_table(evaluation)], figures[2:]),
        Section("Errors", [error_table(evaluation)], []),
        Section("Sizes and numbers of objects", _group_tables(evaluation), []),
    ]
    content = {
        "title": options.title,
        "command": options.command,
        "images": len(truth.files),
        "objects": len(evaluation.marks.object_label),
        "detections": len(detections.score),
        "threshold": evaluation.thresholds.chosen,
        "class_thresholds": {
            name: None if best is None else best.threshold
            for name, best in zip(truth.class_names, evaluation.thresholds.classes, strict=True)
        },
        "calibration_error": [calibration.error for calibration in evaluation.calibration],
        "sections": [section_json(section, output) for section in sections],
        "confusion": _confusion_json(evaluation),
        "curves": curves,
        "worst": [_picture_json(image, output) for image in worst],
    }
    template = resources.files(__package__).joinpath("report.html")
    more = [("Errors", _confusion_table(evaluation)), ("Threshold", _thresholds(evaluation))]
    write_page(output, template, content, more)
    return evaluation


def _threshold_table(evaluation: Evaluation, options: ReportOptions) -> Table:
    second = verified_images(len(evaluation.truth.files), options.seed)
    curve = curve_of(evaluation.marks, evaluation.detections.score, images=second)
    return threshold_table(evaluation, operate(curve, DEFAULT))


def _group_tables(evaluation: Evaluation) -> list[Table]:
    sizes = group_table(
        "sizes",
        "Size of the objects",
        "size",
        evaluation.sizes,
        "Areas as COCO divides them: small below 32 x 32 pixels, large above 96 x 96. False "
        "detections count in the size of their box.",
    )
    crowding = group_table(
        "crowding",
        "Objects in the image",
        "objects in the image",
        evaluation.crowding,
        "Images by their number of objects.",
    )
    return [sizes, crowding]


def _labels(evaluation: Evaluation) -> tuple[list[str], list[str]]:
    names = evaluation.truth.class_names
    return [*names, "background"], [*names, "missed"]


def _confusion_json(evaluation: Evaluation) -> dict[str, Any]:
    matrix = evaluation.confusion
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows, columns = _labels(evaluation)
    return {
        "rows": rows,
        "columns": columns,
        "counts": matrix.tolist(),
        "shares": shares.round(4).tolist(),
    }


def _confusion_table(evaluation: Evaluation) -> Table:
    rows, columns = _labels(evaluation)
    counts = evaluation.confusion.tolist()
    cells = [[name, *row] for name, row in zip(rows, counts, strict=True)]
    return Table("confusion", "Confusion matrix", ["object", *columns], cells)


def _thresholds(evaluation: Evaluation) -> Table:
    """The thresholds as numbers; the page has them as texts with more digits than shares."""
    found = evaluation.thresholds
    pairs = zip(evaluation.truth.class_names, found.classes, strict=True)
    cells: list[list[Cell]] = [["all classes", found.chosen]]
    cells += [[name, None if best is None else best.threshold] for name, best in pairs]
    return Table("thresholds", "Thresholds", ["class", "threshold"], cells)


def _picture_json(image: WorstImage, output: Path) -> dict[str, Any]:
    return {
        "image": image.file_name,
        "missed": image.missed,
        "false": image.false,
        "truth": image.truth.relative_to(output).as_posix(),
        "found": image.found.relative_to(output).as_posix(),
    }
