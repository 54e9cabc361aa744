"""Time of a complete evaluation, the number of parameters and AP, as in Table 2 of the paper."""

import contextlib
import dataclasses
import io
import os
import tempfile
import time
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine import Trainer, setup_config


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        name: name of the config file.
        parameters: number of trainable parameters.
        images: number of images.
        seconds: time to read the images, run the model and compute the metrics; None without an
            evaluation.
        ap: box AP in 0..100; None without an evaluation.
        note: the weights that were evaluated, or why there is no evaluation.
    """

    name: str
    parameters: int
    images: int = 0
    seconds: float | None = None
    ap: float | None = None
    note: str = ""


def time_evaluation(
    config_file: str, overrides: Sequence[str] = (), *, precision: str = "float32"
) -> Evaluation:
    """Evaluate the model of a config on its test data.

    The weights are ``OUTPUT_DIR/model_final.pth`` if this file exists, otherwise ``MODEL.WEIGHTS``.
    Files below ``OUTPUT_DIR`` are left as they are.

    Args:
        config_file: YAML file.
        overrides: alternating config keys and values.
        precision: ``float32``, ``bfloat16`` or ``float16``.
    """
    cfg = setup_config(config_file, overrides)
    model = build_model(cfg)
    name = os.path.splitext(os.path.basename(config_file))[0]
    result = Evaluation(name, count_parameters(model)["trainable"])
    trained = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    weights = trained if os.path.isfile(trained) else cfg.MODEL.WEIGHTS
    if not os.path.isfile(weights):
        note = f"no weights: neither {trained} nor MODEL.WEIGHTS exists"
        return dataclasses.replace(result, note=note)
    MitiDetrCheckpointer(model, cfg=cfg, for_training=False).load(weights)
    cfg.TEST.AMP.ENABLED = precision != "float32"
    if cfg.TEST.AMP.ENABLED:
        cfg.SOLVER.AMP.PRECISION = precision
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                metrics = Trainer.test(cfg, model)
        except (OSError, KeyError) as error:
            return dataclasses.replace(result, note=f"no data: {error}")
        seconds = time.perf_counter() - start
    images = sum(_num_images(cfg, dataset) for dataset in cfg.DATASETS.TEST)
    ap = metrics["bbox"]["AP"] if "bbox" in metrics else None  # None for several data sets
    return dataclasses.replace(result, images=images, seconds=seconds, ap=ap, note=weights)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count all ``parameters`` of a model and the ``trainable`` ones."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "parameters": sum(count for count, _ in counts),
        "trainable": sum(count for count, trainable in counts if trainable),
    }


def _num_images(cfg: CfgNode, dataset: str) -> int:
    return len(Trainer.build_test_loader(cfg, dataset).dataset)
