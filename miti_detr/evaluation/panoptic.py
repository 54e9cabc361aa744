"""Panoptic quality, by hotcoco."""

import io
import itertools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image

from miti_detr.data.object_masks import ids_to_colours
from miti_detr.files import write_text

logger = logging.getLogger(__name__)

_GROUPS = {"": "All", "_th": "Things", "_st": "Stuff"}  # suffix of our metrics: hotcoco's name
_METRICS = ("PQ", "SQ", "RQ")


class PanopticEvaluator(DatasetEvaluator):
    """Panoptic, segmentation and recognition quality of all classes, of things and of stuff.

    The same metrics as those of Detectron2's ``COCOPanopticEvaluator``, whose library is not on the
    package index, with the panoptic quality of each class (``PQ-name``). All are in 0..100.
    """

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        """Look up the data set.

        Args:
            dataset_name: a registered panoptic data set, with ``panoptic_json`` and
                ``panoptic_root`` in its metadata.
            output_dir: existing folder; gets ``panoptic_results.json`` with the segments found.

        Raises:
            ImportError: hotcoco is not installed.
        """
        try:
            from hotcoco.panoptic import PanopticEval
        except ImportError as error:
            raise ImportError(
                "panoptic quality needs hotcoco: `pip install miti_detr[panoptic]`"
            ) from error
        self._compute = PanopticEval
        self._metadata = MetadataCatalog.get(dataset_name)
        self._output_dir = output_dir
        to_contiguous = {
            **self._metadata.stuff_dataset_id_to_contiguous_id,
            **self._metadata.thing_dataset_id_to_contiguous_id,
        }
        self._dataset_ids = {index: number for number, index in to_contiguous.items()}
        self.reset()

    def reset(self) -> None:
        """Drop the stored segmentations."""
        # By image: the loader returns one twice if it takes the place of one that is skipped.
        self._found: dict[Any, tuple[bytes, list[dict[str, Any]]]] = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Store the segmentations of a batch.

        Args:
            inputs: of the model; ``image_id`` is used.
            outputs: of the model; ``panoptic_seg``: ids (height, width) with 0 for no segment, and
                a list of segments with ``id`` and ``category_id`` (contiguous).
        """
        for item, output in zip(inputs, outputs, strict=True):
            ids, segments = output["panoptic_seg"]
            found = [
                {"id": s["id"], "category_id": self._dataset_ids[s["category_id"]]}
                for s in segments
            ]
            self._found[item["image_id"]] = (encode_ids(ids.cpu().numpy()), found)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the stored segmentations of all processes.

        An image of the data set without a segmentation counts as one without segments.

        Returns:
            ``{"panoptic_seg": metric to value in 0..100}`` in the main process, ``{}`` in the
            others. A value that cannot be computed is NaN.
        """
        found = dict(itertools.chain.from_iterable(x.items() for x in comm.gather(self._found)))
        if not comm.is_main_process():
            return {}
        truth_file = PathManager.get_local_path(self._metadata.panoptic_json)
        truth = json.loads(Path(truth_file).read_text())
        with tempfile.TemporaryDirectory(prefix="panoptic") as folder:
            annotations = []
            for number, image in enumerate(truth["images"]):
                size = image["height"], image["width"]
                nothing = encode_ids(np.zeros(size, dtype=np.int64))
                data, segments = found.get(image["id"]) or (nothing, [])
                name = f"{number}.png"
                Path(folder, name).write_bytes(data)
                annotations.append(
                    {"image_id": image["id"], "file_name": name, "segments_info": segments}
                )
            content = {key: truth[key] for key in ("images", "categories")}
            results = os.path.join(self._output_dir, "panoptic_results.json")
            write_text(results, json.dumps({**content, "annotations": annotations}))
            quality = self._compute(
                truth_file,
                results,
                gt_folder=PathManager.get_local_path(self._metadata.panoptic_root),
                pred_folder=folder,
            )
            quality.evaluate()
        return {"panoptic_seg": self._metrics(quality.results(), truth["categories"])}

    def _metrics(
        self, results: dict[str, Any], categories: list[dict[str, Any]]
    ) -> dict[str, float]:
        metrics = {}
        for suffix, group in _GROUPS.items():
            values = results.get(group, {"n": 0})
            for name in _METRICS:
                value = 100 * values[name.lower()] if values["n"] else float("nan")
                metrics[name + suffix] = value
        for category in categories:
            of_class = results["per_class"].get(category["id"])
            seen = of_class and of_class["tp"] + of_class["fp"] + of_class["fn"]
            metrics[f"PQ-{category['name']}"] = 100 * of_class["pq"] if seen else float("nan")
        return metrics


def encode_ids(ids: np.ndarray) -> bytes:
    """A PNG of segment ids (H, W) in COCO's panoptic colours."""
    with io.BytesIO() as file:
        Image.fromarray(ids_to_colours(ids)).save(file, format="PNG")
        return file.getvalue()
