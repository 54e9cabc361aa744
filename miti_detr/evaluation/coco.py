"""COCO evaluation of boxes and masks.

Detectron2's evaluator with recalls, and with a fast implementation that returns the same numbers.
"""

import contextlib
import gc
import io
import itertools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util
from pycocotools.cocoeval import COCOeval

from miti_detr.files import write_text

logger = logging.getLogger(__name__)

# The twelve statistics of COCO; Detectron2 reports the first six, the precisions.
_PRECISIONS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}
RECALLS = {"AR1": 6, "AR10": 7, "AR": 8, "ARs": 9, "ARm": 10, "ARl": 11}
STATISTICS = {**_PRECISIONS, **RECALLS}
_UNKNOWN = np.iinfo(np.int64).min  # category of a class that the data set does not have


class InstanceEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` for boxes and masks, at most 100 per image.

    Adds the recalls ``AR1``, ``AR10``, ``AR`` (1, 10, 100 detections per image), ``ARs``, ``ARm``,
    ``ARl`` to the results. All values are in 0..100.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str,
        *,
        tasks: Sequence[str] = ("bbox",),
        fast: bool = True,
    ) -> None:
        """Read the ground truth.

        Args:
            dataset_name: a registered data set.
            output_dir: existing folder for predictions and results.
            tasks: ``bbox``, ``segm`` or both.
            fast: use faster-coco-eval if it is installed, else pycocotools. Both return the same
                numbers.
        """
        super().__init__(
            dataset_name,
            tuple(tasks),
            True,
            output_dir,
            use_fast_impl=False,
            allow_cached_coco=False,  # the data may have changed since the last run
        )
        # faster-coco-eval finds nothing where the ids of images are texts or exceed a float64.
        integers = all(type(i) is int and abs(i) <= 2**53 for i in self._coco_api.getImgIds())
        self._eval_class = eval_class(fast and integers)

    @property
    def is_fast(self) -> bool:
        """Whether faster-coco-eval is used."""
        return self._eval_class is not COCOeval

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Store the detections of a batch, as one array for each image.

        Args:
            inputs: of the model; ``image_id`` is used.
            outputs: of the model; ``instances`` with ``pred_boxes`` (xyxy in pixels of the data
                set's image), ``scores`` and ``pred_classes``, and for ``segm`` with ``pred_masks``,
                bool or run-length encoded.

        Raises:
            ValueError: a detection is not finite; names the image.
        """
        for item, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            rows = np.empty((len(instances), 6))  # x, y, width, height, score, class
            boxes = instances.pred_boxes.tensor.numpy()
            rows[:, :4] = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            rows[:, 4] = instances.scores.numpy()
            rows[:, 5] = instances.pred_classes.numpy()
            check_finite(item, rows)
            found = {"image_id": item["image_id"], "instances": rows}
            if "segm" in self._tasks:
                found["masks"] = encoded(instances.pred_masks)
            self._predictions.append(found)

    def evaluate(self, img_ids: list[Any] | None = None) -> dict[str, Any]:
        """Evaluate the stored detections of all processes.

        Args:
            img_ids: evaluate only these images; None: all.

        Returns:
            For each task, metric to value in 0..100, in the main process; ``{}`` in the others.
        """
        with _without_garbage_collection():
            return super().evaluate(img_ids)

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: list[Any] | None = None
    ) -> None:
        """Write the detections in COCO's result format, then evaluate them."""
        # The loader returns an image twice if it takes the place of one that cannot be read.
        predictions = list({p["image_id"]: p for p in predictions}.values())
        detections = self._to_coco(predictions)
        write_text(
            os.path.join(self._output_dir, "coco_instances_results.json"),
            json.dumps(self._with_original_ids(detections)),
        )
        if not self._do_evaluation:
            logger.info("The data set has no annotations, so there is nothing to evaluate")
            return
        names = self._class_names()
        for task in self._tasks:
            coco_eval = None
            if detections:  # COCO's tools do not take an empty list
                with contextlib.redirect_stdout(io.StringIO()):  # the same numbers are in our table
                    coco_eval = _evaluate_predictions_on_coco(
                        self._coco_api,
                        detections,
                        task,
                        cocoeval_fn=self._eval_class,
                        img_ids=img_ids,
                        max_dets_per_image=self._max_dets_per_image,
                    )
            self._results[task] = self._derive_coco_results(coco_eval, task, names)

    def _class_names(self) -> list[str] | None:
        """Names of the categories in the order of their ids; metadata may name stuff as well."""
        names = self._metadata.get("thing_classes")
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if not names or not to_contiguous:
            return names
        return [names[to_contiguous[i]] for i in self._coco_api.getCatIds()]

    def _to_coco(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detections in COCO's result format, without classes that the data set does not have."""
        rows = np.concatenate([p["instances"] for p in predictions])
        image_ids = itertools.chain.from_iterable(
            itertools.repeat(p["image_id"], len(p["instances"])) for p in predictions
        )
        classes = rows[:, 5].astype(np.int64)
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous:
            size = max(*to_contiguous.values(), int(classes.max(initial=0))) + 1
            dataset_ids = np.full(size, _UNKNOWN, dtype=np.int64)
            dataset_ids[list(to_contiguous.values())] = list(to_contiguous)
            classes = dataset_ids[classes]
        columns = (image_ids, classes.tolist(), rows[:, :4].tolist(), rows[:, 4].tolist())
        detections = [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for image_id, category, box, score in zip(*columns, strict=True)
        ]
        if "segm" in self._tasks:
            masks = itertools.chain.from_iterable(p["masks"] for p in predictions)
            for detection, mask in zip(detections, masks, strict=True):
                detection["segmentation"] = mask
        return [d for d in detections if d["category_id"] != _UNKNOWN]

    def _with_original_ids(self, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detections with the ids of the user's own file, where these had to be normalised."""
        images = self._metadata.get("original_image_ids")
        originals = self._metadata.get("original_category_ids")
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id") or {}
        categories = {
            number: originals[index] for number, index in to_contiguous.items() if originals
        }
        if images is None and all(k == v for k, v in categories.items()):
            return detections
        return [
            {
                **detection,
                "image_id": (images or {}).get(detection["image_id"], detection["image_id"]),
                "category_id": categories.get(detection["category_id"], detection["category_id"]),
            }
            for detection in detections
        ]

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        for name, index in RECALLS.items():
            value = -1 if coco_eval is None else coco_eval.stats[index]
            results[name] = float(value * 100) if value >= 0 else float("nan")
        return results


def encoded(masks: Any) -> list[dict[str, Any]]:
    """Run-length encodings of masks.

    Args:
        masks: (D, height, width) bool, or D encodings, which are returned as they are.
    """
    if not isinstance(masks, torch.Tensor):
        return list(masks)
    pixels = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
    return [{**m, "counts": m["counts"].decode("ascii")} for m in mask_util.encode(pixels)]


def check_finite(item: dict[str, Any], rows: np.ndarray) -> None:
    """Check the detections of an image.

    Args:
        item: input of the model; names the image.
        rows: (D, ...) boxes and scores.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    bad = int((~np.isfinite(rows)).any(axis=-1).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(rows)} detections of the image "
            f"{item.get('file_name', item['image_id'])} are not finite. The weights may have "
            "diverged, or the reduced precision (TEST.AMP.PRECISION) overflows"
        )


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Suspend the search for reference cycles, which takes half the time of an evaluation."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def eval_class(fast: bool) -> Any:
    """The evaluation class of faster-coco-eval if ``fast`` and installed, else pycocotools'."""
    return (_fast_class() if fast else None) or COCOeval


def _fast_class() -> Any:
    """The class of faster-coco-eval, or None if it is not installed."""
    try:
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster
    except ImportError:
        logger.info("faster-coco-eval is not installed; pycocotools is used, which is slower")
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
