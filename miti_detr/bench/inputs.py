"""Random images and random weights with which a model can be measured."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

PRECISIONS = ("float32", "bfloat16", "float16")


def random_inputs(
    num_classes: int,
    *,
    batch: int = 2,
    sizes: Sequence[tuple[int, int]] = ((512, 672),),
    objects: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Make random images with random objects, in the format of a dataset mapper.

    Args:
        num_classes: number of classes of the objects.
        batch: number of images.
        sizes: (height, width) in pixels; the images take them in turn.
        objects: number of objects per image.
        seed: seed of pixels and objects.
    """
    rng = np.random.default_rng(seed)
    inputs = []
    for index in range(batch):
        height, width = sizes[index % len(sizes)]
        corner = rng.uniform(0, 0.7, (objects, 2))
        side = rng.uniform(0.05, 0.3, (objects, 2))
        boxes = np.concatenate([corner, corner + side], axis=1) * (width, height, width, height)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.gt_classes = torch.from_numpy(rng.integers(0, num_classes, objects))
        pixels = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
        inputs.append({"image": torch.from_numpy(pixels), "instances": instances})
    return inputs


@torch.no_grad()
def random_weights(
    cfg: CfgNode, inputs: Sequence[dict[str, Any]], *, seed: int = 0
) -> dict[str, Tensor]:
    """Make random weights for the model of a config.

    Frozen batch norms get the statistics of the images, as in a trained network. Without them the
    activations of a deep random network overflow.

    Args:
        cfg: config of the model; it is not changed.
        inputs: images, as :func:`random_inputs` makes them.
        seed: seed of the weights.

    Returns:
        The state dict of the model.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ACCELERATE = False  # so that each batch norm is called
    torch.manual_seed(seed)
    model = build_model(cfg).eval()
    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    with contextlib.ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(_observe).remove)
        model(list(inputs))
    return model.state_dict()


def _observe(norm: nn.Module, arguments: tuple[Tensor]) -> None:
    variance, mean = torch.var_mean(arguments[0], (0, 2, 3))
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance.clamp(min=1e-6))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Return an autocast to ``bfloat16`` or ``float16``, or one that does nothing.

    Args:
        device: device of the model.
        precision: one of ``PRECISIONS``.
    """
    dtype = None if precision == "float32" else getattr(torch, precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
