"""Evaluation of pre-training: COCO's metrics with the patches as objects."""

import contextlib
import io
import itertools
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from detectron2.structures import BoxMode
from detectron2.utils import comm
from pycocotools.coco import COCO

from miti_detr.files import write_text

from .coco import STATISTICS, check_finite, eval_class

logger = logging.getLogger(__name__)

_IOU = "bbox"


class PatchEvaluator(DatasetEvaluator):
    """COCO's box metrics, with the patches that the mapper has drawn as the only objects.

    All patches belong to one category, so a detection may match any patch of its image, as in the
    set loss. Boxes are in pixels of the image file.
    """

    def __init__(self, output_dir: str, *, fast: bool = True) -> None:
        """Choose where to write.

        Args:
            output_dir: existing folder; gets ``patches.json`` (the truth, in COCO format) and
                ``coco_instances_results.json``.
            fast: use faster-coco-eval if it is installed, else pycocotools. Both return the same
                numbers.
        """
        self._output_dir = output_dir
        self._eval_class = eval_class(fast)
        self.reset()

    def reset(self) -> None:
        """Drop the stored detections."""
        # By image: the loader returns one twice if it takes the place of one that is skipped.
        self._found: dict[Any, tuple[dict[str, Any], list[Any], list[Any]]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Store the patches and detections of a batch.

        Args:
            inputs: of :class:`~miti_detr.data.PatchDatasetMapper`.
            outputs: of the model, ``instances`` in pixels of the file.

        Raises:
            ValueError: a detection is not finite; names the image.
        """
        for item, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor
            check_finite(item, torch.column_stack([boxes, instances.scores]).float().numpy())
            self._found[item["image_id"]] = (
                {key: item[key] for key in ("file_name", "height", "width")},
                _to_xywh(item["patch_boxes"].to(boxes.dtype)),
                list(zip(_to_xywh(boxes), instances.scores.tolist(), strict=True)),
            )

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the stored detections of all processes.

        Returns:
            ``{"bbox": metric to value in 0..100}`` in the main process, ``{}`` in the others.
        """
        found = dict(itertools.chain.from_iterable(x.items() for x in comm.gather(self._found)))
        if not comm.is_main_process():
            return {}
        if not found:
            logger.warning("No image could be read, so there is nothing to evaluate")
            return {}
        numbered = list(enumerate(found.values(), start=1))
        truth = _coco_format([(i, record, patches) for i, (record, patches, _) in numbered])
        results = [
            {"image_id": i, "category_id": 1, "bbox": box, "score": score}
            for i, (_, _, detections) in numbered
            for box, score in detections
        ]
        for name, content in (("patches", truth), ("coco_instances_results", results)):
            write_text(os.path.join(self._output_dir, f"{name}.json"), json.dumps(content))
        stats = self._statistics(truth, results)
        values = {name: 100 * float(stats[index]) for name, index in STATISTICS.items()}
        return {_IOU: {name: v if v >= 0 else float("nan") for name, v in values.items()}}

    def _statistics(self, truth: dict[str, Any], results: list[dict[str, Any]]) -> Sequence[float]:
        """The twelve statistics of COCO; -1 where there is nothing to measure."""
        if not results:  # COCO's tools do not take an empty list
            return [-1.0] * len(STATISTICS)
        with contextlib.redirect_stdout(io.StringIO()):  # the same numbers are in our table
            coco = COCO()
            coco.dataset = truth
            coco.createIndex()
            evaluation = _evaluate_predictions_on_coco(
                coco, results, _IOU, cocoeval_fn=self._eval_class
            )
        return evaluation.stats


def _coco_format(images: list[tuple[int, dict[str, Any], list[Any]]]) -> dict[str, Any]:
    """The truth in COCO format, from the number, the record and the patches of each image."""
    numbers = itertools.count(1)
    return {
        "info": {"description": "patches drawn for evaluation"},
        "images": [{"id": i, **record} for i, record, _ in images],
        "annotations": [
            {
                "id": next(numbers),
                "image_id": i,
                "category_id": 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, _, patches in images
            for box in patches
        ],
        "categories": [{"id": 1, "name": "patch"}],
    }


def _to_xywh(boxes: Any) -> list[Any]:
    return BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
