"""What a benchmark runs on: its config, images and weights."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from miti_detr.bench.inputs import random_inputs, random_weights
from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.checkpoint.export import convert_file
from miti_detr.engine import setup_config

from .worker import in_worker


@dataclasses.dataclass(frozen=True)
class BenchSpec:
    """What to measure.

    Attributes:
        config_file: YAML file.
        overrides: alternating config keys and values.
        batch: number of images per step.
        sizes: (height, width) in pixels; the images take them in turn.
        precision: ``float32``, ``bfloat16`` or ``float16`` (autocast).
        objects: number of objects per image, for training.
        repeats: number of measured steps.
        warmup: number of steps before them.
        threads: number of torch threads.
        seed: seed of weights and images.
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
    """Weights for all peers.

    Attributes:
        path: checkpoint.
        hf_folder: folder of the same weights for Hugging Face's model; "" if it is not measured.
        description: origin of the weights.
    """

    path: str
    hf_folder: str
    description: str


def bench_config(spec: BenchSpec, peer: str = "ours") -> CfgNode:
    """Read the config of a peer.

    Args:
        spec: names the file and the overrides.
        peer: one of ``PEERS``.

    Raises:
        ValueError: Hugging Face's model cannot compute what the config says.
    """
    cfg = setup_config(spec.config_file, spec.overrides)
    detr = cfg.MODEL.DETR
    if peer == "detr":
        detr.LAYER_RESIDUAL = "none"
    if peer == "hf" and (detr.LAYER_RESIDUAL != "none" or detr.PRE_NORM):
        raise ValueError(
            "Hugging Face's DETR has no layer residual and is post-norm. Add "
            "MODEL.DETR.LAYER_RESIDUAL none MODEL.DETR.PRE_NORM False"
        )
    if peer == "hf" and len(set(spec.sizes)) > 1 and detr.PADDING_MASK != "nearest":
        raise ValueError(
            "Hugging Face's DETR uses another padding mask for images of different sizes. Add "
            "MODEL.DETR.PADDING_MASK nearest"
        )
    return cfg


def make_inputs(cfg: CfgNode, spec: BenchSpec) -> list[dict[str, Any]]:
    """Make the random images and objects of a benchmark."""
    return random_inputs(
        cfg.MODEL.DETR.NUM_CLASSES,
        batch=spec.batch,
        sizes=spec.sizes,
        objects=spec.objects,
        seed=spec.seed,
    )


def make_weights(spec: BenchSpec, path: str, hf_folder: str = "") -> str:
    """Write weights for all peers.

    These are ``MODEL.WEIGHTS`` if it names an existing file, otherwise random weights; see
    :func:`~miti_detr.bench.inputs.random_weights`.

    Args:
        spec: what to measure.
        path: checkpoint to write.
        hf_folder: folder for the same weights in Hugging Face's format; "" writes none.

    Returns:
        A description of the weights.
    """
    cfg = bench_config(spec, "hf" if hf_folder else "ours")
    model = build_model(cfg)
    if os.path.isfile(cfg.MODEL.WEIGHTS):
        MitiDetrCheckpointer(model, cfg=cfg, for_training=True).load(cfg.MODEL.WEIGHTS)
        description = f"weights of {cfg.MODEL.WEIGHTS}"
    else:
        model.load_state_dict(random_weights(cfg, make_inputs(cfg, spec), seed=spec.seed))
        description = "random weights"
    folder, name = os.path.split(path)
    MitiDetrCheckpointer(model, folder, save_to_disk=True, cfg=cfg).save(name.removesuffix(".pth"))
    if hf_folder:
        convert_file(path, hf_folder, "hf")
    return description


@contextlib.contextmanager
def shared_weights(spec: BenchSpec, *, hf: bool = False) -> Iterator[Weights]:
    """Yield the weights of :func:`make_weights`, written to a temporary folder by a worker."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.pth")
        hf_folder = os.path.join(folder, "hf") if hf else ""
        description = in_worker(spec.threads, make_weights, spec, path, hf_folder)
        yield Weights(path, hf_folder, description)
