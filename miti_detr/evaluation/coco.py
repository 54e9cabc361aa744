"""COCO evaluation of boxes.

Detectron2's evaluator with recalls, and with a fast implementation that gives the same numbers.
"""

import contextlib
import io
import json
import logging
import os
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from pycocotools.cocoeval import COCOeval

from miti_detr.files import write_text

logger = logging.getLogger(__name__)

# Recalls among the twelve statistics of COCO; Detectron2 reports the first six, the precisions.
RECALLS = {"AR1": 6, "AR10": 7, "AR": 8, "ARs": 9, "ARm": 10, "ARl": 11}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> "BoxEvaluator":
    """Build the evaluator of a data set, which need not be in COCO format.

    Args:
        cfg: uses ``OUTPUT_DIR`` and ``TEST.FAST_COCO_EVAL``.
        dataset_name: a registered data set.
        output_folder: for predictions and results; None: ``OUTPUT_DIR/inference/{dataset_name}``.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    os.makedirs(folder, exist_ok=True)
    return BoxEvaluator(dataset_name, folder, fast=cfg.TEST.FAST_COCO_EVAL)


class BoxEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` for boxes, at most 100 per image.

    Adds the recalls ``AR1``, ``AR10``, ``AR`` (1, 10, 100 detections per image), ``ARs``, ``ARm``,
    ``ARl`` to the results. All values are in 0..100.
    """

    def __init__(self, dataset_name: str, output_dir: str, *, fast: bool = True) -> None:
        """Read the ground truth.

        Args:
            dataset_name: a registered data set.
            output_dir: existing folder for predictions and results.
            fast: use faster-coco-eval where it is installed, else pycocotools. The numbers are the
                same.
        """
        super().__init__(dataset_name, ("bbox",), True, output_dir, use_fast_impl=False)
        self._eval_class = (_fast_class() if fast else None) or COCOeval

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[Any] | None = None
    ) -> None:
        """Write the detections in COCO's result format, then evaluate them."""
        detections = [d for prediction in predictions for d in prediction["instances"]]
        to_dataset = {
            contiguous: dataset_id
            for dataset_id, contiguous in self._metadata.get(
                "thing_dataset_id_to_contiguous_id", {}
            ).items()
        }
        if to_dataset:
            for detection in detections:
                detection["category_id"] = to_dataset[detection["category_id"]]
        write_text(
            os.path.join(self._output_dir, "coco_instances_results.json"), json.dumps(detections)
        )
        if not self._do_evaluation:
            logger.info("the data set has no annotations: nothing to evaluate")
            return
        coco_eval = None
        if detections:  # COCO's tools do not take an empty list
            with contextlib.redirect_stdout(io.StringIO()):  # the table says it
                coco_eval = _evaluate_predictions_on_coco(
                    self._coco_api,
                    detections,
                    "bbox",
                    cocoeval_fn=self._eval_class,
                    img_ids=img_ids,
                    max_dets_per_image=self._max_dets_per_image,
                )
        names = self._metadata.get("thing_classes")
        self._results["bbox"] = self._derive_coco_results(coco_eval, "bbox", names)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        for name, index in RECALLS.items():
            value = -1 if coco_eval is None else coco_eval.stats[index]
            results[name] = float(value * 100) if value >= 0 else float("nan")
        return results


def _fast_class() -> Any:
    """Name the class of faster-coco-eval, or None where it is not installed."""
    try:
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster
    except ImportError:
        logger.info("faster-coco-eval is not installed: pycocotools evaluates, which is slower")
        return None

    class FastEval(COCOeval_faster):
        """Has the statistics of pycocotools."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, print_function=print)

        def summarize(self) -> None:
            """Compute and print the statistics."""
            super().summarize()
            self.stats: np.ndarray = np.asarray(self.all_stats[:12])

    return FastEval
