"""Key lists of the published models, and weights in them."""

import functools
import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr import add_miti_detr_config
from tests.helpers import ROOT, tiny_config


@functools.cache
def published() -> dict:
    """``models``: name -> key -> shape; ``hf_old_sources``: key -> official key and rows."""
    with gzip.open(Path(__file__).parent / "keys.json.gz") as file:
        return json.load(file)


def hollow(name: str) -> dict[str, Tensor]:
    """Weights of a published model in full shape that take no memory."""
    return {
        key: torch.zeros(()).expand(shape) for key, shape in published()["models"][name].items()
    }


def slim(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a published model; all dimensions but the first are cut to 1 or 2.

    Conversions look at the first dimension only.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn([*shape[:1], *(min(n, 2) for n in shape[1:])], generator=generator)
        for key, shape in published()["models"][name].items()
    }


def r50_config(*overrides: object) -> CfgNode:
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/coco/detr_R50.yaml"))
    cfg.merge_from_list(list(overrides))
    return cfg


def tiny_model(seed: int = 0, *overrides: object) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(tiny_config("MODEL.DEVICE", "cpu", *overrides))


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal keys in any order, equal bits."""
    assert set(actual) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=0, atol=0, msg=lambda m, k=key: f"{k}: {m}"
        )
