"""Speed of deformable attention and of Deformable-DETR: ``python -m benchmarks.deformable``.

The operator: ``grid_sample`` (the plain form), sums of rows (the accelerated form), and the C++ of
``torch-ms-deform-attn`` where it is installed. A training step: ours, plain and accelerated, and
Hugging Face's model on the same weights and images. Times are the least of several rounds in turn.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor

from miti_detr.accelerate.sums_of_rows import sample_rows
from miti_detr.bench.inputs import random_inputs, random_weights
from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.checkpoint.export import convert_file
from miti_detr.engine.cpu import keep_freed_memory
from miti_detr.layers import deformable_attention
from miti_detr.modeling import targets_from_instances

from .techniques import config

COCO = [(100, 134), (50, 67), (25, 34), (13, 17)]  # of 800 x 1066 pixels
SHAPES = [(10, 14), (5, 7), (3, 4)]
# name -> levels, images, queries (0: one for each cell), heads, points, channels per head
OPERATORS = {
    "encoder, 800 x 1066": (COCO, 1, 0, 8, 4, 32),
    "decoder, 800 x 1066, 300 queries": (COCO, 1, 300, 8, 4, 32),
    "encoder, shapes, 32 images": (SHAPES, 32, 0, 4, 4, 16),
    "decoder, shapes, 32 images, 20 queries": (SHAPES, 32, 20, 4, 4, 16),
}
Operator = Callable[..., Tensor]


def operators() -> dict[str, Operator]:
    """Implementations by name, with the arguments of ``deformable_attention``."""
    found: dict[str, Operator] = {"grid_sample": deformable_attention, "sums of rows": sample_rows}
    try:
        from torch_ms_deform_attn import ms_deform_attn
    except ImportError:
        return found

    def compiled(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
        sizes = torch.tensor(shapes)
        cells = sizes.prod(1)
        result: Tensor = ms_deform_attn(value, sizes, cells.cumsum(0) - cells, locations, weights)
        return result

    return {**found, "torch-ms-deform-attn": compiled}


def arguments(
    levels: list[tuple[int, int]], images: int, queries: int, heads: int, points: int, width: int
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """Random arguments; points lie some cells around the places of the queries."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    cells = sum(h * w for h, w in levels)
    if queries:
        places = torch.rand((queries, 2), generator=generator)
    else:
        grids = [
            torch.stack(torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy"), -1)
            for h, w in levels
        ]
        places = torch.cat(
            [
                ((grid + 0.5) / torch.tensor([w, h])).flatten(0, 1)
                for grid, (h, w) in zip(grids, levels, strict=True)
            ]
        )
    sizes = torch.tensor([(w, h) for h, w in levels])[:, None]
    offsets = normal(images, len(places), heads, len(levels), points, 2) * 3 / sizes
    weights = normal(images, len(places), heads, len(levels) * points).softmax(-1)
    return (
        normal(images, cells, heads, width),
        levels,
        places[None, :, None, None, None] + offsets,
        weights.unflatten(-1, (len(levels), points)),
    )


def least(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, the least of all rounds but the first."""
    best = dict.fromkeys(runs, float("inf"))
    for index in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def measure_operators(rounds: int) -> str:
    """Measure the operator, forward and with backward, at all sizes."""
    rows = []
    for name, sizes in OPERATORS.items():
        value, levels, locations, weights = arguments(*sizes)
        inputs = [x.requires_grad_() for x in (value, locations, weights)]

        for direction, work in (("forward", _forward), ("forward and backward", _both)):
            runs = {k: partial(work, run, inputs, levels) for k, run in operators().items()}
            times = least(runs, rounds)
            plain = times["grid_sample"]
            cells = [f"{t * 1e3:.1f} ms ({plain / t:.1f}x)" for t in times.values()]
            rows.append([name, direction, *cells])
    return tabulate(rows, ["size", "", *operators()], tablefmt="github")


def _forward(run: Operator, inputs: list[Tensor], levels: Any) -> None:
    with torch.no_grad():
        run(inputs[0], levels, *inputs[1:])


def _both(run: Operator, inputs: list[Tensor], levels: Any) -> None:
    output = run(inputs[0], levels, *inputs[1:])
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def deformable_config(*overrides: Any) -> CfgNode:
    """The published multi-scale model, plain, for the CPU, without dropout.

    The class loss has weight 1, as in Hugging Face's loss.
    """
    cfg = config("configs/coco/deformable_detr_R50_base_50ep.yaml")
    cfg.merge_from_list(["MODEL.DETR.DROPOUT", 0.0, "MODEL.DETR.PADDING_MASK", "nearest"])
    cfg.MODEL.DETR.CLASS_WEIGHT = 1.0
    cfg.merge_from_list(list(overrides))
    return cfg


def huggingface_step(cfg: CfgNode, weights: dict[str, Tensor], inputs: list[Any]) -> Any:
    """Return a training step of Hugging Face's model, or None if it is not installed."""
    try:
        from transformers import DeformableDetrForObjectDetection
    except ImportError:
        return None
    ours: Any = build_model(cfg)
    ours.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        MitiDetrCheckpointer(ours, folder, cfg=cfg).save("model")
        convert_file(str(Path(folder, "model.pth")), str(Path(folder, "hf")), "hf")
        settings: dict[str, Any] = {"auxiliary_loss": True, "dropout": 0.0}
        model: Any = DeformableDetrForObjectDetection.from_pretrained(
            str(Path(folder, "hf")), local_files_only=True, **settings
        ).train()
    batch = ours.preprocess_image(inputs)
    mask = torch.zeros(len(inputs), *batch.tensor.shape[-2:], dtype=torch.int64)
    for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
        row[:height, :width] = 1
    targets = targets_from_instances(
        [x["instances"] for x in inputs],
        num_classes=ours.num_classes,
        device=ours.device,
        dtype=torch.float32,
    )
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    return lambda: model(pixel_values=batch.tensor, pixel_mask=mask, labels=labels).loss


def measure_steps(rounds: int, size: tuple[int, int]) -> str:
    """Measure forward, losses and backward of two images."""
    cfg = deformable_config()
    inputs = random_inputs(80, sizes=(size, (size[0] - 32, size[1] - 64)))
    weights = random_weights(cfg, inputs)
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, accelerated in (("ours", True), ("ours, plain", False)):
        model: Any = build_model(deformable_config("MODEL.ACCELERATE", accelerated)).train()
        model.load_state_dict(weights)
        steps[name] = partial(_total_loss, model, inputs)
    if (theirs := huggingface_step(cfg, weights, inputs)) is not None:
        steps["Hugging Face"] = theirs
    with torch.no_grad():
        losses = {name: float(step()) for name, step in steps.items()}
    times = least({name: partial(_step, step) for name, step in steps.items()}, rounds)
    rows = [
        [name, f"{t * 1e3:.0f} ms", f"{t / times['ours']:.2f}", f"{losses[name]:.4f}"]
        for name, t in times.items()
    ]
    return tabulate(rows, ["training step", "time", "of ours", "loss"], tablefmt="github")


def _total_loss(model: Any, inputs: list[Any]) -> Tensor:
    return torch.stack(list(model(inputs).values())).sum()


def _step(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--size", default="512x672", help="largest image of the training step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the commands of this package do
    print(measure_operators(args.rounds), "\n")
    height, width = (int(side) for side in args.size.split("x"))
    print(measure_steps(args.rounds, (height, width)))


if __name__ == "__main__":
    main()
