"""Records which query is matched with which object, at each evaluation on the same images.

L decoder layers, M objects of all images together.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from miti_detr.data import DetrDatasetMapper, build_test_loader
from miti_detr.modeling.targets import targets_from_instances

from .writers import drop_records, first_record

MATCHES_FILE = "matches.json"


class MatchingRecorder(hooks.EvalHook):
    """Writes ``matches.json`` with one line for each evaluation of the run.

    A line has ``iteration``, ``num_queries`` and ``queries``. The latter are L lists of M indices:
    the query that the matcher of the training loss assigns to each object, or -1 for none. The
    objects and their order are always the same, so that lines and runs on the same data can be
    compared.

    The recorder draws no random number and does not change the model, so that a run with it equals
    one without it to the last bit.
    """

    def __init__(self, cfg: CfgNode, num_images: int = 64) -> None:
        """Choose the images.

        Args:
            cfg: of the run; the images are of the first of ``DATASETS.TEST``.
            num_images: how many, spread evenly over the data set.

        Raises:
            ValueError: ``DATASETS.TEST`` is empty, or ``num_images`` is not positive.
        """
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}; it must be at least 1")
        super().__init__(cfg.TEST.EVAL_PERIOD, self.record)
        if not cfg.DATASETS.TEST:
            raise ValueError(
                "DATASETS.TEST is empty, and MatchingRecorder needs a data set with labels. "
                "Name one there"
            )
        self._path = Path(cfg.OUTPUT_DIR, MATCHES_FILE)
        self._batch_size = cfg.TEST.IMS_PER_BATCH
        # With the objects, but without the augmentation of the training
        self._map = DetrDatasetMapper(cfg, is_train=False, with_objects=True)
        self._records: list[dict[str, Any]] = []
        if comm.is_main_process():
            records: Any = build_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=_as_it_is).dataset
            chosen = np.linspace(0, len(records) - 1, min(num_images, len(records)))
            self._records = [records[index] for index in chosen.round().astype(int).tolist()]

    def before_train(self) -> None:
        """Remove the lines that will be recorded again.

        Raises:
            ValueError: the model has no matcher.
        """
        model = self._model()
        if not hasattr(model, "predict") or not hasattr(model, "criterion"):
            raise ValueError(f"MatchingRecorder needs a MitiDetr, not {type(model).__name__}")
        if comm.is_main_process():
            drop_records(str(self._path), first_record(self.trainer))

    def record(self) -> None:
        """Match the objects with the current weights and add a line."""
        if not comm.is_main_process():
            return
        model = self._model()
        found = []
        with inference_context(model), torch.no_grad():
            for start in range(0, len(self._records), self._batch_size):
                batch = self._records[start : start + self._batch_size]
                found.append(_match(model, [self._map(record) for record in batch]))
        line = {
            "iteration": get_event_storage().iter,
            "num_queries": model.num_queries,
            "queries": np.concatenate(found, axis=1).tolist(),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _model(self) -> Any:
        return getattr(self.trainer.model, "module", self.trainer.model)


def _match(model: Any, inputs: list[dict[str, Any]]) -> np.ndarray:
    """The query of each object (L, M) of a batch, the objects in the order of the images."""
    prediction = model.predict(inputs)
    logits, boxes = prediction.logits.float(), prediction.boxes.float()
    targets = targets_from_instances(
        [item["instances"] for item in inputs],
        num_classes=model.num_classes,
        device=model.device,
        dtype=boxes.dtype,
    )
    counts = np.array([len(target["labels"]) for target in targets])
    first = np.cumsum(counts) - counts
    layer, image, query, target = model.criterion.matcher.match_layers(
        logits, boxes, targets
    ).numpy()
    queries = np.full((len(logits), counts.sum()), -1)
    queries[layer, first[image] + target] = query
    return queries


def _as_it_is(record: dict[str, Any]) -> dict[str, Any]:
    return record
