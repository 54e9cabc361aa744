"""A stand-in for a trained model."""

import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import nn

from miti_detr.engine.predictor import Predictor
from miti_detr.modeling.segmentation import RunLengthMasks


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


class FixedMasks(FixedDetector):
    """The same with masks: the upper half of each box, bool or run-length encoded."""

    def __init__(self, mask_format: str = "bool") -> None:
        super().__init__()
        self.mask_format = mask_format

    def forward(self, batch: list[dict]) -> list[dict]:
        outputs = super().forward(batch)
        for item, output in zip(batch, outputs, strict=True):
            height, width = item["height"], item["width"]
            masks = torch.zeros(2, height, width, dtype=torch.bool)
            masks[0, : height // 2, : width // 2] = True
            masks[1, : height // 2] = True
            output["instances"].pred_masks = (
                masks if self.mask_format == "bool" else RunLengthMasks.encode(masks)
            )
        return outputs


class FixedPanoptic(FixedMasks):
    """The same as a panoptic model: class 1 in the left half, class 2 (stuff) in the right one."""

    def forward(self, batch: list[dict]) -> list[dict]:
        outputs = super().forward(batch)
        for item, output in zip(batch, outputs, strict=True):
            ids = torch.ones(item["height"], item["width"], dtype=torch.int32)
            ids[:, item["width"] // 2 :] = 2
            segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
            output["panoptic_seg"] = ids, segments
        return outputs


def predictor_of(model: nn.Module) -> Predictor:
    resize = T.ResizeShortestEdge([32, 32], 64)
    return Predictor(model=model, resize=resize, input_format="BGR")


@pytest.fixture
def predictor() -> Predictor:
    return predictor_of(FixedDetector())
