"""A stand-in for a trained model, and a tiny model with random weights in several formats."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.predict import DetectionPredictor, Detections, Found
from miti_detr.predict.inputs import Source
from miti_detr.visualize.classes import ClassTable
from tests.fill import filled
from tests.helpers import tiny_config

CLASSES = ClassTable(["cat", "dog"], [17, 18])


class FixedBackend:
    """Finds in every image class 1 with score 0.9 in its left half and class 0 with 0.3 in all."""

    input_format, orientation, precision, provider = "BGR", "apply", "float32", "nothing"
    classes, threshold, with_masks = CLASSES, 0.5, False

    def __init__(self) -> None:
        self.batches: list[int] = []

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        height, width = image.shape[:2]
        return {"image": image.transpose(2, 0, 1), "height": height, "width": width}

    def detect(self, items: Sequence[dict[str, Any]]) -> list[Found]:
        self.batches.append(len(items))
        return [self._find(item["height"], item["width"]) for item in items]

    def _find(self, height: int, width: int) -> Found:
        boxes = np.array([[0, 0, width, height], [0, 0, width / 2, height]], dtype=np.float32)
        return Found(boxes, np.array([0.3, 0.9], np.float32), np.array([0, 1]))

    def result(self, found: Found, size: tuple[int, int], source: Source | None) -> Detections:
        return Detections(found, image_size=size, classes=self.classes, source=source)


@pytest.fixture
def predictor() -> DetectionPredictor:
    return DetectionPredictor(FixedBackend())


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose detections differ from query to query and image to image."""
    folder = tmp_path_factory.mktemp("weights")
    cfg = tiny_config("MODEL.DETR.SIZE_DIVISIBILITY", 16)
    model = build_model(cfg)
    model.load_state_dict(filled(model.state_dict()))
    torch.manual_seed(0)
    MitiDetrCheckpointer(model, str(folder), cfg=cfg).save("tiny")
    return str(Path(folder) / "tiny.pth")
