"""What is made of a finished run: the report, the threshold, curves and detections."""

import logging
import shlex
from pathlib import Path

from detectron2.config import CfgNode

from miti_detr.engine.predictor import Predictor
from miti_detr.predict import load_predictor
from miti_detr.predict.predictor import DEFAULT_THRESHOLD
from miti_detr.report import ReportOptions, read_truth, report_model
from miti_detr.report.store import store_threshold
from miti_detr.visualize.curves import draw_curves, read_run
from miti_detr.visualize.detections import draw_detections

logger = logging.getLogger(__name__)


def is_evaluated(output: Path) -> bool:
    """Return whether a run has ended with the evaluation of its weights."""
    return _is_newer(output / "inference" / "coco_table.txt", output / "model_final.pth")


def draw_results(cfg: CfgNode, output: Path) -> None:
    """Write the report and draw curves and detections, unless the run has them.

    The threshold with the best F1 is recorded in the weights.

    Args:
        cfg: of the run.
        output: its folder, with ``model_final.pth``.
    """
    weights, detections = output / "model_final.pth", output / "detections.png"
    if _is_newer(detections, weights):
        return
    dataset, classes = cfg.DATASETS.TEST[0], cfg.MODEL.DETR.NUM_CLASSES
    threshold = _report(dataset, weights, output / "report")
    # The weights, which now record the threshold, are still those of the table.
    (output / "inference" / "coco_table.txt").touch()
    draw_curves([read_run(output)], output / "curves.png")
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(weights)
    draw_detections(Predictor(cfg), dataset, detections, num_classes=classes, threshold=threshold)


def _is_newer(result: Path, weights: Path) -> bool:
    both = result.is_file() and weights.is_file()
    return both and result.stat().st_mtime >= weights.stat().st_mtime


def _report(dataset: str, weights: Path, folder: Path) -> float:
    """Write the report and record the threshold; return it, or the default if there is none."""
    predictor = load_predictor(str(weights), threshold=0.0)
    command = shlex.join(["miti-detr", "report", str(weights), dataset])
    options = ReportOptions(f"{weights.name} on {dataset}", command=command)
    try:
        found = report_model(predictor, read_truth(dataset), folder, options).thresholds
    except ValueError as error:  # such as images of another size than the annotations say
        logger.warning("there is no report: %s", error)
        return DEFAULT_THRESHOLD
    if not found.on_choice.true:
        return DEFAULT_THRESHOLD
    store_threshold(str(weights), found.chosen)
    logger.info("the best threshold, %.3f, is kept with the weights", found.chosen)
    return found.chosen
