"""Pipelines that have never heard of this project: only ``add_miti_detr_config`` is ours."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from tests.helpers import tiny_config
from tests.small_shapes import small_shapes

# What Detectron2's own solver does not know; docs/pipelines.md says so.
STOCK_SOLVER = ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "SOLVER.STEPS", ())


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a small ``shapes``, which is registered."""
    with small_shapes(tmp_path_factory.mktemp("data")) as folder:
        yield folder


@pytest.fixture
def cfg(shapes: Path, tmp_path: Path) -> CfgNode:
    """A tiny Miti-DETR for two steps of Detectron2's own trainer."""
    return tiny_config(
        *STOCK_SOLVER,
        *("MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2),
        *("TEST.EVAL_PERIOD", 0, "OUTPUT_DIR", str(tmp_path / "out")),
    )


@pytest.fixture(scope="session")
def weights(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the tiny model, by Detectron2's own checkpointer."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    DetectionCheckpointer(build_model(tiny_config()), str(folder)).save("tiny")
    return str(folder / "tiny.pth")
