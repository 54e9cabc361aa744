"""Cost of encoder, decoder and set loss as a function of tokens, queries, batch and objects.

N images, n tokens, Q queries, C width, L decoder layers, K classes.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from miti_detr.accelerate import accelerate
from miti_detr.bench.inputs import autocast
from miti_detr.bench.meters import Clock, start_memory
from miti_detr.modeling import HungarianMatcher, SetCriterion, Target
from miti_detr.modeling.transformer import ResidualTransformer

from . import VARIABLES
from .loop_criterion import LoopCriterion
from .spec import BenchSpec, bench_config
from .worker import Alternation, Step, alternate, times_as_fast

# Grids (h, w) of about 300 to 17,000 tokens; 800 x 1333 pixels have 1,050 at stride 32 and 4,200 at
# stride 16.
TOKEN_GRIDS = ((15, 20), (25, 42), (42, 50), (50, 84), (80, 105), (100, 170))
QUERIES = (100, 300, 600, 900)
BATCHES = (1, 2, 4, 8, 16)
OBJECTS = (0, 10, 50, 100, 200, 500)
SECONDS_PER_POINT = 30.0  # no further round starts after this time


@dataclasses.dataclass(frozen=True)
class Point:
    """One size at which cost is measured.

    Attributes:
        batch: N.
        grid: (h, w) of the feature.
        queries: Q.
        objects: number of objects per image, to measure the set loss; None measures encoder and
            decoder, forward only.
    """

    batch: int
    grid: tuple[int, int]
    queries: int
    objects: int | None = None


def bench_scaling(spec: BenchSpec, variable: str, *, plain: bool = False) -> list[dict[str, Any]]:
    """Measure the cost at several values of one variable; ``spec`` gives the other variables.

    Encoder and decoder are measured forward, the set loss forward and backward.

    Args:
        spec: what to measure. Its first size gives the grid.
        variable: one of ``VARIABLES``.
        plain: whether to measure the plain form in turn.

    Returns:
        For each value its ``value``, the ``point``, and for each peer the median ``seconds`` and
        the ``memory`` (see :func:`~miti_detr.bench.meters.memory_marks`); with two peers also
        ``times_as_fast``.

    Raises:
        ValueError: the variable is unknown.
    """
    result = []
    for value, point in _points(spec, variable):
        measured = alternate(
            ["ours", "plain"] if plain else ["ours"],
            _prepare_criterion if point.objects is not None else _prepare_transformer,
            (spec, point),
            threads=spec.threads,
            warmup=1,
            repeats=spec.repeats,
            budget=SECONDS_PER_POINT,
        )
        result.append({"value": value, "point": dataclasses.asdict(point), **_summary(measured)})
    return result


def _points(spec: BenchSpec, variable: str) -> list[tuple[int, Point]]:
    if variable not in VARIABLES:
        raise ValueError(f"unknown variable {variable!r}. Use one of {', '.join(VARIABLES)}")
    cfg = bench_config(spec)
    stride = 16 if cfg.MODEL.RESNETS.RES5_DILATION == 2 else 32
    height, width = spec.sizes[0]
    base = Point(
        batch=spec.batch,
        grid=(-(-height // stride), -(-width // stride)),
        queries=cfg.MODEL.DETR.NUM_OBJECT_QUERIES,
    )
    change = dataclasses.replace
    if variable == "tokens":
        return [(h * w, change(base, batch=1, grid=(h, w))) for h, w in TOKEN_GRIDS]
    if variable == "queries":
        return [(queries, change(base, queries=queries)) for queries in QUERIES]
    if variable == "batch":
        return [(batch, change(base, batch=batch)) for batch in BATCHES]
    return [(objects, change(base, objects=objects)) for objects in OBJECTS]


def _summary(measured: Alternation) -> dict[str, Any]:
    peers = {
        name: {"seconds": statistics.median(seconds["step"]), "memory": measured.memory[name]}
        for name, seconds in measured.seconds.items()
    }
    if len(peers) == 1:
        return peers
    return {**peers, "times_as_fast": times_as_fast(*measured.seconds.values())["step"]}


# The functions below run in the worker.
def _prepare_transformer(peer: str, spec: BenchSpec, point: Point) -> tuple[None, Step]:
    cfg, device = _begin(spec)
    model = ResidualTransformer(cfg)
    if peer == "ours":
        accelerate(model)
    model.eval().to(device)
    shape = (point.batch, cfg.MODEL.DETR.HIDDEN_DIM, *point.grid)
    source, position = (torch.randn(shape, device=device) for _ in range(2))
    queries = torch.randn(point.queries, shape[1], device=device)
    mask = torch.zeros(point.batch, *point.grid, dtype=torch.bool, device=device)

    def work() -> None:
        with torch.no_grad(), autocast(device, spec.precision):
            model(source, mask, queries, position)

    return _timed(work, device)


def _prepare_criterion(peer: str, spec: BenchSpec, point: Point) -> tuple[None, Step]:
    cfg, device = _begin(spec)
    detr = cfg.MODEL.DETR
    layers, classes, objects = detr.DEC_LAYERS, detr.NUM_CLASSES, point.objects or 0
    criterion: nn.Module = LoopCriterion(num_classes=classes)
    if peer == "ours":
        criterion = SetCriterion(num_classes=classes, matcher=HungarianMatcher())
    criterion.to(device)
    size = (layers, point.batch, point.queries)
    logits = torch.randn(*size, classes + 1, device=device, requires_grad=True)
    boxes = _random_boxes(*size).to(device).requires_grad_()
    targets: list[Target] = [
        {
            "labels": torch.randint(0, classes, (objects,), device=device),
            "boxes": _random_boxes(objects).to(device),
        }
        for _ in range(point.batch)
    ]

    def work() -> None:
        torch.stack(list(criterion(logits, boxes, targets).values())).sum().backward()
        logits.grad = boxes.grad = None

    return _timed(work, device)


def _begin(spec: BenchSpec) -> tuple[CfgNode, torch.device]:
    cfg = bench_config(spec)
    torch.manual_seed(spec.seed)
    return cfg, torch.device(cfg.MODEL.DEVICE)


def _timed(work: Callable[[], None], device: torch.device) -> tuple[None, Step]:
    start_memory()

    def step() -> dict[str, float]:
        clock = Clock(device)
        work()
        clock.mark("step")
        return clock.parts

    return None, step


def _random_boxes(*size: int) -> Tensor:
    """Make boxes (*size, 4), ``cxcywh``, inside the unit square."""
    side = 0.05 + 0.25 * torch.rand(*size, 2)
    return torch.cat([side / 2 + (1 - side) * torch.rand(*size, 2), side], dim=-1)
