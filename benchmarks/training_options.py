"""What options of the training cost: ``python -m benchmarks.training_options``.

Steps of training as they are, in parts (``SOLVER.ACCUMULATE``), with averaged weights
(``SOLVER.EMA``), and with both; evaluations with and without ``TEST.LOSS``. The variants take
turns, each in its own process, and the table gives time and memory over those of the variant
without options in the same run.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from miti_detr.bench.inputs import random_inputs, random_weights
from miti_detr.bench.meters import Clock, start_memory
from miti_detr.engine import build_optimizer, setup_config
from miti_detr.engine.hooks import NonFiniteGuard
from miti_detr.engine.solver import WeightAverage
from miti_detr.engine.step.train_step import TrainStep
from miti_detr.engine.validation import with_losses

from .worker import Alternation, Step, alternate

ROOT = Path(__file__).parents[1]
EMA = ("SOLVER.EMA.ENABLED", "True")
TRAINING: dict[str, tuple[str, ...]] = {
    "training": (),
    "ACCUMULATE": ("SOLVER.ACCUMULATE", "{parts}"),
    "EMA": EMA,
    "ACCUMULATE and EMA": ("SOLVER.ACCUMULATE", "{parts}", *EMA),
}
EVALUATION = {"evaluation": ("TEST.LOSS", "False"), "TEST.LOSS": ("TEST.LOSS", "True")}


def prepare(
    name: str, config_file: str, batch: int, parts: int, size: tuple[int, int]
) -> tuple[None, Step]:
    """Build a variant in a worker; returns nothing and its step."""
    options = [x.format(parts=parts) for x in (TRAINING | EVALUATION)[name]]
    cfg = setup_config(config_file, ["SOLVER.IMS_PER_BATCH", str(batch), *options])
    inputs = random_inputs(cfg.MODEL.DETR.NUM_CLASSES, batch=batch, sizes=(size,))
    model = build_model(cfg)
    model.load_state_dict(random_weights(cfg, inputs))
    make = _training if name in TRAINING else _evaluation
    work = make(cfg, model, inputs)
    start_memory()

    def step() -> dict[str, float]:
        clock = Clock(next(model.parameters()).device)
        work()
        clock.mark("step")
        return clock.parts

    return None, step


def _training(
    cfg: CfgNode, model: torch.nn.Module, inputs: list[dict[str, Any]]
) -> Callable[[], None]:
    class Same:
        def __iter__(self) -> Any:
            while True:
                yield inputs

    step = TrainStep(
        model,
        Same(),
        build_optimizer(cfg, model),
        seed=1,
        guard=NonFiniteGuard(cfg),
        parts=cfg.SOLVER.ACCUMULATE,
    )
    average = WeightAverage.from_config(cfg, model)

    def train() -> None:
        with EventStorage():
            step.run_step()
            step.write_record()
        if average is not None:
            average.update()

    return train


def _evaluation(
    cfg: CfgNode, model: torch.nn.Module, inputs: list[dict[str, Any]]
) -> Callable[[], None]:
    called = with_losses(model)[0] if cfg.TEST.LOSS else model
    called.eval()

    def evaluate() -> None:
        with torch.no_grad():
            called(inputs)

    return evaluate


def table(results: Sequence[Alternation]) -> str:
    """Format time and memory of all variants, over those of the first in each of the results."""
    rows = []
    for found in results:
        first = next(iter(found.seconds))
        for name, seconds in found.seconds.items():
            pairs = zip(seconds["step"], found.seconds[first]["step"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            memory = {k: v["device_peak"] or v["added"] for k, v in found.memory.items()}
            peak = found.memory[name]["device_peak"] or found.memory[name]["peak"]
            median = 1e3 * statistics.median(seconds["step"])
            over = f"{memory[name] / memory[first]:.2f}x" if memory[first] else ""
            rows.append([name, f"{median:,.0f}", f"{ratio:.3f}x", f"{peak:,.0f}", over])
    headers = ["", "ms", "time", "peak MiB", "memory of steps"]
    return tabulate(rows, headers, colalign=("left", *("right",) * 4), disable_numparse=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--config-file", default=str(ROOT / "configs/coco/miti_detr_R50.yaml"))
    add("--batch", type=int, default=4, help="images of a step")
    add("--parts", type=int, default=4, help="SOLVER.ACCUMULATE")
    add("--size", type=int, nargs=2, default=(512, 672), metavar=("HEIGHT", "WIDTH"))
    add("--repeats", type=int, default=7)
    add("--threads", type=int, default=2)
    args = parser.parse_args()
    arguments = (args.config_file, args.batch, args.parts, tuple(args.size))
    results = [
        alternate(names, prepare, arguments, threads=args.threads, warmup=2, repeats=args.repeats)
        for names in ([*TRAINING], [*EVALUATION])
    ]
    print(table(results))


if __name__ == "__main__":
    main()
