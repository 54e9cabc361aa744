"""Data sets as Detectron2 users register them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.structures import BoxMode
from PIL import Image

from miti_detr.engine import Trainer


@pytest.fixture
def registered() -> Iterator[list[str]]:
    """Names to remove in the end."""
    names: list[str] = []
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [DefaultTrainer, Trainer])
def test_register_coco_instances(
    trainer: type[DefaultTrainer], cfg: CfgNode, shapes: Path, registered: list[str]
) -> None:
    registered.append("my_shapes")
    register_coco_instances("my_shapes", {}, str(shapes / "train.json"), str(shapes / "train"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("my_shapes",), ()
    made = trainer(cfg)
    made.train()
    assert made.storage.latest()["total_loss"][1] == 1
    assert MetadataCatalog.get("my_shapes").thing_classes == ["circle", "square", "triangle"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [DefaultTrainer, Trainer])
def test_hand_written_function(
    trainer: type[DefaultTrainer], cfg: CfgNode, tmp_path: Path, registered: list[str]
) -> None:
    """No file but the images: a function that returns Detectron2's dicts, boxes in xyxy."""
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")

    def load() -> list[dict[str, Any]]:
        box = {"bbox": [5, 6, 30, 28], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2}
        return [
            {
                "file_name": str(tmp_path / f"{i}.png"),
                "image_id": i,
                "height": 40,
                "width": 50,
                "annotations": [{**box, "iscrowd": 0}],
            }
            for i in range(4)
        ]

    registered.append("by_hand")
    DatasetCatalog.register("by_hand", load)
    MetadataCatalog.get("by_hand").thing_classes = ["a", "b", "c"]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("by_hand",), ()
    made = trainer(cfg)
    made.train()
    assert made.storage.latest()["total_loss"][1] == 1
