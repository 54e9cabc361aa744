"""A model and a data set that train in milliseconds, and the ``train_net.py`` of this model."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor, nn

import train_net
from miti_detr.engine import setup_config


@META_ARCH_REGISTRY.register()
class TinyDetector(nn.Module):
    """One box per image: a convolution with dropout, then a linear layer."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, kernel_size=3, stride=2)
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(cfg.MODEL.DETR.DROPOUT)
        self.head = nn.Linear(4, cfg.MODEL.DETR.NUM_CLASSES + 4)
        self.to(cfg.MODEL.DEVICE)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        outputs = [self._predict(x["image"]) for x in batched_inputs]
        if not self.training:
            return [
                {"instances": self._instances(out, x["height"], x["width"])}
                for out, x in zip(outputs, batched_inputs, strict=True)
            ]
        losses = [
            self._losses(out, x["instances"])
            for out, x in zip(outputs, batched_inputs, strict=True)
        ]
        return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}

    def _predict(self, image: Tensor) -> Tensor:
        feature = self.backbone(image.to(self.head.weight.device).float()[None] / 255)
        return self.head(self.dropout(self.norm(feature.mean(dim=(2, 3)))))[0].float()

    def _losses(self, output: Tensor, instances: Instances) -> dict[str, Tensor]:
        height, width = instances.image_size
        scale = torch.tensor([width, height, width, height], device=output.device)
        box = (instances.gt_boxes.tensor[0].to(output.device) / scale).float()
        label = instances.gt_classes[0].to(output.device)
        return {
            "loss_ce": nn.functional.cross_entropy(output[4:], label),
            "loss_bbox": nn.functional.l1_loss(output[:4].sigmoid(), box),
        }

    def _instances(self, output: Tensor, height: int, width: int) -> Instances:
        scale = torch.tensor([width, height, width, height], device=output.device)
        corners = output[:4].sigmoid() * scale
        box = torch.cat([torch.minimum(corners[:2], corners[2:]), torch.maximum(*corners.split(2))])
        scores, label = output[4:].softmax(0).max(0)
        return Instances(
            (height, width),
            pred_boxes=Boxes(box[None]),
            scores=scores[None],
            pred_classes=label[None],
        )


def write_data(folder: Path, num_images: int = 10) -> None:
    """Write images of 24 x 32 pixels with one box of one of two classes each, in COCO format."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(num_images):
        pixels = rng.integers(0, 80, (24, 32, 3), dtype=np.uint8)
        x, y, side, label = *rng.integers(2, 10, 3).tolist(), i % 2
        pixels[y : y + side, x : x + side, label] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 24, "width": 32})
        box = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": label * 5 + 1, **box})
    categories = [{"id": 1, "name": "red"}, {"id": 6, "name": "green"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))


def options(data: Path, output: Path, **changes: Any) -> list[str]:
    """Overrides that train the tiny model on the tiny data; ``changes``: keys with __ for dots."""
    source = [
        [name, str(data / "data.json"), str(data / "images")] for name in ("tiny", "tiny_val")
    ]
    values = {
        "MODEL__META_ARCHITECTURE": "TinyDetector",
        "MODEL__DEVICE": "cpu",
        "MODEL__WEIGHTS": "",
        "MODEL__DETR__NUM_CLASSES": 2,
        "DATASETS__COCO_FORMAT": source,
        "DATASETS__TRAIN": ("tiny",),
        "DATASETS__TEST": (),
        "DATALOADER__NUM_WORKERS": 0,
        "INPUT__MIN_SIZE_TRAIN": (24, 28),
        "INPUT__MIN_SIZE_TEST": 24,
        "SOLVER__IMS_PER_BATCH": 4,
        "SOLVER__BASE_LR": 0.01,
        "SOLVER__WARMUP_ITERS": 0,
        "SOLVER__MAX_ITER": 6,
        "SOLVER__STEPS": (4,),
        "SOLVER__CHECKPOINT_PERIOD": 3,
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full_model",
        "SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 0.1,
        "SEED": 7,
        "OUTPUT_DIR": str(output),
        **changes,
    }
    return [s for key, value in values.items() for s in (key.replace("__", "."), str(value))]


def config(data: Path, output: Path, **changes: Any) -> CfgNode:
    """The config of :func:`options`."""
    return setup_config(opts=options(data, output, **changes))


def main(args: argparse.Namespace) -> Any:
    """The work of one process; importing this module has registered the model."""
    return train_net.main(args)
