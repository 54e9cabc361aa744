"""A stand-in for a trained model."""

import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import nn

from miti_detr.engine.predictor import Predictor


class FixedDetector(nn.Module):
    """Finds in every image class 1 with score 0.9 in its left half and class 0 with 0.3 in all."""

    def forward(self, batch: list[dict]) -> list[dict]:
        return [{"instances": self.detect(item["height"], item["width"])} for item in batch]

    @staticmethod
    def detect(height: int, width: int) -> Instances:
        result = Instances((height, width))
        result.pred_boxes = Boxes(torch.tensor([[0, 0, width / 2, height], [0, 0, width, height]]))
        result.scores = torch.tensor([0.9, 0.3])
        result.pred_classes = torch.tensor([1, 0])
        return result


@pytest.fixture
def predictor() -> Predictor:
    resize = T.ResizeShortestEdge([32, 32], 64)
    return Predictor(model=FixedDetector(), resize=resize, input_format="BGR")
