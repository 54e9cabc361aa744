"""What a benchmark runs on: its config, images and weights. N images, T objects, K classes."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.checkpoint.export import convert_file
from miti_detr.engine import setup_config
from miti_detr.modeling import MitiDetr

from .plain import build_plain
from .worker import in_child


@dataclasses.dataclass(frozen=True)
class BenchSpec:
    """What to measure.

    Attributes:
        config_file: YAML file.
        overrides: alternating config keys and values.
        batch: images per step.
        sizes: (height, width) in pixels, dealt out to the images in turn.
        precision: ``float32``, ``bfloat16`` or ``float16`` (by autocast).
        objects: per image, in training.
        repeats: measured steps.
        warmup: steps before them.
        threads: of torch's operators.
        seed: of weights and images.
    """

    config_file: str
    overrides: tuple[str, ...] = ()
    batch: int = 2
    sizes: tuple[tuple[int, int], ...] = ((512, 672),)
    precision: str = "float32"
    objects: int = 20
    repeats: int = 7
    warmup: int = 2
    threads: int = 1
    seed: int = 0


class Weights(NamedTuple):
    """Where weights are.

    Attributes:
        path: checkpoint.
        hf_folder: for Hugging Face's model; "" if it is not measured.
        said: what they are, in words.
    """

    path: str
    hf_folder: str
    said: str


def bench_config(spec: BenchSpec, side: str = "ours") -> CfgNode:
    """Read the config of a side.

    Args:
        spec: names the file and the overrides.
        side: of ``SIDES``.

    Raises:
        ValueError: if Hugging Face's model cannot be the one of the config.
    """
    cfg = setup_config(spec.config_file, spec.overrides)
    detr = cfg.MODEL.DETR
    if side == "detr":
        detr.LAYER_RESIDUAL = "none"
    if side == "hf" and (detr.LAYER_RESIDUAL != "none" or detr.PRE_NORM):
        raise ValueError(
            "Hugging Face's DETR has no layer residual and is post-norm: add "
            "MODEL.DETR.LAYER_RESIDUAL none MODEL.DETR.PRE_NORM False"
        )
    if side == "hf" and len(set(spec.sizes)) > 1 and detr.PADDING_MASK != "nearest":
        raise ValueError(
            "Hugging Face's DETR has another padding mask where images differ in size: add "
            "MODEL.DETR.PADDING_MASK nearest"
        )
    return cfg


def make_inputs(cfg: CfgNode, spec: BenchSpec) -> list[dict[str, Any]]:
    """Random images with random objects, as a dataset mapper gives them."""
    rng = np.random.default_rng(spec.seed)
    inputs = []
    for index in range(spec.batch):
        height, width = spec.sizes[index % len(spec.sizes)]
        corner = rng.uniform(0, 0.7, (spec.objects, 2))
        side = rng.uniform(0.05, 0.3, (spec.objects, 2))
        boxes = np.concatenate([corner, corner + side], axis=1) * (width, height, width, height)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        labels = rng.integers(0, cfg.MODEL.DETR.NUM_CLASSES, spec.objects)
        instances.gt_classes = torch.from_numpy(labels)
        pixels = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
        inputs.append({"image": torch.from_numpy(pixels), "instances": instances})
    return inputs


def make_weights(spec: BenchSpec, path: str, hf_folder: str = "") -> str:
    """Write weights for all sides.

    ``MODEL.WEIGHTS`` if it is a file that is here, otherwise random ones, with the frozen batch
    norms set to the statistics of the images, as in a trained network.

    Args:
        spec: of the benchmark.
        path: checkpoint to write.
        hf_folder: where to put the same weights for Hugging Face's model; "": nowhere.

    Returns:
        What they are, in words.
    """
    cfg = bench_config(spec, "hf" if hf_folder else "ours")
    torch.manual_seed(spec.seed)
    model = build_plain(cfg)
    said = "random weights"
    if os.path.isfile(cfg.MODEL.WEIGHTS):
        MitiDetrCheckpointer(model, cfg=cfg, for_training=True).load(cfg.MODEL.WEIGHTS)
        said = f"weights of {cfg.MODEL.WEIGHTS}"
    else:
        _set_frozen_norms(model, make_inputs(cfg, spec))
    folder, name = os.path.split(path)
    MitiDetrCheckpointer(model, folder, save_to_disk=True, cfg=cfg).save(name.removesuffix(".pth"))
    if hf_folder:
        convert_file(path, hf_folder, "hf")
    return said


@contextlib.contextmanager
def shared_weights(spec: BenchSpec, *, hf: bool = False) -> Iterator[Weights]:
    """Yield the weights of :func:`make_weights` in a temporary folder, made in another process."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pth")
        hf_folder = os.path.join(folder, "hf") if hf else ""
        said = in_child(spec.threads, make_weights, spec, path, hf_folder)
        yield Weights(path, hf_folder, said)


@torch.no_grad()
def _set_frozen_norms(model: MitiDetr, inputs: list[dict[str, Any]]) -> None:
    """Let frozen batch norms normalise these images; without it deep random networks explode."""

    def observe(norm: nn.Module, arguments: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(arguments[0], (0, 2, 3))
        norm.get_buffer("running_mean").copy_(mean)
        norm.get_buffer("running_var").copy_(variance.clamp(min=1e-6))

    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    handles = [norm.register_forward_pre_hook(observe) for norm in norms]
    model.backbone(model.preprocess_image(inputs))
    for handle in handles:
        handle.remove()
