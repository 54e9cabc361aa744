"""What several test modules share: goldens, small configs, inputs."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from miti_detr import add_miti_detr_config

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"


def load_golden(name: str) -> dict[str, torch.Tensor]:
    """Arrays of ``tests/goldens/<name>.npz`` as tensors (text arrays stay numpy)."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        return {
            key: torch.from_numpy(file[key]) if file[key].dtype.kind in "fiub" else file[key]
            for key in file.files
        }


def tiny_config(*overrides: Any) -> CfgNode:
    """A MitiDetr small enough to train a step in milliseconds; ``overrides`` are KEY, VALUE, ..."""
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/shapes/miti_detr.yaml"))
    cfg.merge_from_list(
        [
            *("MODEL.DETR.HIDDEN_DIM", 32),
            *("MODEL.DETR.NHEADS", 2),
            *("MODEL.DETR.DIM_FEEDFORWARD", 64),
            *("MODEL.DETR.DEC_LAYERS", 2),
            *("MODEL.DETR.SIZE_DIVISIBILITY", 0),
            *("MODEL.DETR.NUM_OBJECT_QUERIES", 7),
        ]
    )
    cfg.merge_from_list(list(overrides))
    return cfg


def build_on_meta(cfg: CfgNode) -> nn.Module:
    """Build the model of a config without parameter values, in a tenth of the time."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def training_input(
    size: tuple[int, int], boxes: list[list[float]], classes: list[int], seed: int = 0
) -> dict[str, Any]:
    """One image of random pixels with objects (xyxy pixels), as a dataset mapper returns it."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {
        "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator),
        "instances": instances,
        "height": size[0],
        "width": size[1],
        "file_name": f"image{seed}.png",
    }


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with this many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def mkldnn_runs() -> bool:
    """Whether oneDNN's own operators compute here: not with Arm's library, not without oneDNN."""
    return torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_acl_supported()


def kernels(function: Callable[..., Any], *args: Any) -> set[str]:
    """Names of the operators that a call runs, those inside of others as well."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    return {event.key for event in profile.key_averages()}


@contextlib.contextmanager
def saved_for_backward() -> Iterator[dict[int, torch.Tensor]]:
    """Tensors that are kept for the backward pass, by the address of their memory."""
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved
