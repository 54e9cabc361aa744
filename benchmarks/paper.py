"""The paper's Table 2: time of a whole evaluation, parameters and AP."""

import contextlib
import dataclasses
import io
import os
import tempfile
import time
from typing import Any

from detectron2.modeling import build_model

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine.trainer import Trainer

from .model import count_parameters
from .spec import BenchSpec, bench_config

# Of the paper, on COCO val2017 with four V100: model, seconds, parameters, AP
PUBLISHED = (
    ("DETR R50 (paper)", 484, 41_302_368, 37.7),
    ("UP-DETR R50 (paper)", 496, 41_302_880, 33.1),
    ("Miti-DETR R50 (paper)", 486, 41_302_368, 40.5),
)


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """A row of the table.

    Attributes:
        name: of the config file.
        parameters: trainable ones, as the paper counts.
        images: evaluated.
        seconds: of reading, inference and metrics together; None if there is nothing to evaluate.
        ap: in 0..100; None likewise.
        note: why there is no evaluation, or whose weights were evaluated.
    """

    name: str
    parameters: int
    images: int = 0
    seconds: float | None = None
    ap: float | None = None
    note: str = ""


def paper_row(spec: BenchSpec) -> PaperRow:
    """Evaluate the model of a config on its test data.

    The weights are ``OUTPUT_DIR/model_final.pth`` if there are any, otherwise ``MODEL.WEIGHTS``.

    Args:
        spec: names config and precision; batches are of ``TEST.IMS_PER_BATCH``.
    """
    cfg = bench_config(spec)
    name = os.path.splitext(os.path.basename(spec.config_file))[0]
    model = build_model(cfg)
    row = PaperRow(name, count_parameters(model)["trainable"])
    trained = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    weights = trained if os.path.isfile(trained) else cfg.MODEL.WEIGHTS
    if not os.path.isfile(weights):
        return dataclasses.replace(row, note=f"no weights: neither {trained} nor MODEL.WEIGHTS")
    MitiDetrCheckpointer(model, cfg=cfg, for_training=False).load(weights)
    cfg.TEST.AMP.ENABLED = spec.precision != "float32"
    cfg.SOLVER.AMP.PRECISION = spec.precision if cfg.TEST.AMP.ENABLED else "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                results = Trainer.test(cfg, model)
        except (OSError, KeyError) as error:
            return dataclasses.replace(row, note=f"no data: {error}")
        seconds = time.perf_counter() - start
    images = sum(_num_images(cfg, dataset) for dataset in cfg.DATASETS.TEST)
    ap = results["bbox"]["AP"] if "bbox" in results else None  # several sets: none is the one
    return dataclasses.replace(row, images=images, seconds=seconds, ap=ap, note=weights)


def _num_images(cfg: Any, dataset: str) -> int:
    return len(Trainer.build_test_loader(cfg, dataset).dataset)
