"""A small model: ResNet-18, 1 + 2 transformer layers, 32 channels."""

import dataclasses
from typing import Any

from benchmarks import worker
from benchmarks.spec import BenchSpec
from tests.helpers import ROOT

CONFIG = str(ROOT / "configs/coco/miti_detr_R50.yaml")
SMALL: tuple[Any, ...] = (
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.DEPTH", 18),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.DETR.HIDDEN_DIM", 32),
    *("MODEL.DETR.NHEADS", 2),
    *("MODEL.DETR.ENC_LAYERS", 1),
    *("MODEL.DETR.DEC_LAYERS", 2),
    *("MODEL.DETR.DIM_FEEDFORWARD", 64),
    *("MODEL.DETR.NUM_OBJECT_QUERIES", 7),
    *("MODEL.DETR.NUM_CLASSES", 5),
)
DETR = ("MODEL.DETR.LAYER_RESIDUAL", "none", "MODEL.DETR.PADDING_MASK", "nearest")
PADDED = ((64, 96), (96, 64))


def small_spec(*overrides: Any, **changes: Any) -> BenchSpec:
    words = tuple(str(word) for word in (*SMALL, *overrides))
    spec = BenchSpec(CONFIG, words, sizes=((64, 96),), objects=3, repeats=1, warmup=0)
    return dataclasses.replace(spec, **changes)


class InlineWorker:
    """Does the work of a ``Worker`` in this process, without the time to start another one."""

    def __init__(self, threads: int) -> None: ...

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return worker._run(function, args, kwargs)

    def __enter__(self) -> "InlineWorker":
        return self

    def __exit__(self, *_: object) -> None: ...
