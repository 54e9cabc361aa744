"""What each technique of ``miti_detr.accelerate`` gains: ``python -m benchmarks.techniques``.

Each technique is switched off while the others stay on, and measured in turn with the model that
has all of them. The gain is the time without it over the time with it, minus one. One more row
switches off the private operators of oneDNN, which several techniques use.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from miti_detr import add_miti_detr_config
from miti_detr.accelerate import TECHNIQUES, accelerate, onednn
from miti_detr.bench.inputs import random_inputs
from miti_detr.engine import build_optimizer

ROOT = Path(__file__).parents[1]
PRIVATE = "private operators of oneDNN"
R50 = ("configs/coco/miti_detr_R50.yaml", 2, (512, 672), 20)
SHAPES = ("configs/shapes/miti_detr.yaml", 32, (80, 80), 4)
WORKLOADS = {
    "R50 inference float32": (R50, False, torch.float32),
    "R50 inference bfloat16": (R50, False, torch.bfloat16),
    "R50 training float32": (R50, True, torch.float32),
    "R50 training bfloat16": (R50, True, torch.bfloat16),
    "shapes training float32": (SHAPES, True, torch.float32),
}


def config(file: str) -> CfgNode:
    """Read a config for a plain model on the CPU."""
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / file))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ACCELERATE", "False"])
    return cfg


def build(cfg: CfgNode, without: tuple[str, ...]) -> nn.Module:
    """Build a model with all techniques but some; the weights are always the same."""
    torch.manual_seed(0)
    return accelerate(build_model(cfg), without=without)


def work(
    cfg: CfgNode, model: nn.Module, inputs: list[dict[str, Any]], train: bool, dtype: torch.dtype
) -> Callable[[], None]:
    """Return what is measured: an inference, or a training step."""
    model.train(train)
    optimizer = build_optimizer(cfg, model)

    def run() -> None:
        with (
            torch.set_grad_enabled(train),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            output = model(inputs)
        if train:
            optimizer.zero_grad()
            sum(output.values()).backward()
            optimizer.step()

    return run


def measure(name: str, rounds: int) -> dict[str, float]:
    """Seconds of a workload, the least of all rounds: with all techniques, and without each."""
    (file, batch, size, objects), train, dtype = WORKLOADS[name]
    cfg = config(file)
    inputs = random_inputs(
        cfg.MODEL.DETR.NUM_CLASSES, batch=batch, sizes=(size,), objects=objects, seed=0
    )
    variants: dict[str, tuple[str, ...]] = {"all": (), **{t: (t,) for t in TECHNIQUES}}
    variants |= {"none": tuple(TECHNIQUES), PRIVATE: ()}
    runs = {k: work(cfg, build(cfg, v), inputs, train, dtype) for k, v in variants.items()}
    without_private = mock.patch.object(onednn, "_works", mock.Mock(return_value=False))
    runs[PRIVATE] = without_private(runs[PRIVATE])
    best = dict.fromkeys(runs, float("inf"))
    for index in range(rounds + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if index:  # the first round warms up
                best[key] = min(best[key], time.perf_counter() - start)
    return best


def main() -> None:
    """Measure all workloads and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each workload")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    columns = {name: measure(name, args.rounds) for name in WORKLOADS}
    rows = [["all techniques", *(f"{c['all'] * 1e3:.0f} ms" for c in columns.values())]]
    for technique in (*TECHNIQUES, PRIVATE, "none"):
        label = "all of them" if technique == "none" else technique
        gains = [f"{(c[technique] / c['all'] - 1) * 100:+.0f} %" for c in columns.values()]
        rows.append([label, *gains])
    print(tabulate(rows, ["gain of", *columns], tablefmt="github"))


if __name__ == "__main__":
    main()
