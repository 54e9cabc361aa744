"""Measurement of one model on random images."""

from typing import Any

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model

from miti_detr.bench.inputs import random_inputs, random_weights
from miti_detr.bench.steps import bench_model, build_bench_model, steps_table
from tests.helpers import tiny_config


def test_random_inputs_have_the_format_of_a_mapper() -> None:
    inputs = random_inputs(5, batch=3, sizes=((64, 96), (96, 64)), objects=4)
    assert [x["image"].shape for x in inputs] == [(3, 64, 96), (3, 96, 64), (3, 64, 96)]
    for x in inputs:
        instances = x["instances"]
        height, width = instances.image_size
        boxes = instances.gt_boxes.tensor
        assert boxes.shape == (4, 4)
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert set(instances.gt_classes.tolist()) <= set(range(5))
    again = random_inputs(5, batch=3, sizes=((64, 96), (96, 64)), objects=4)
    assert torch.equal(inputs[0]["image"], again[0]["image"])


def test_random_weights_normalise_the_activations() -> None:
    """Each frozen batch norm gets the mean and the variance of its input."""
    cfg = tiny_config("MODEL.ACCELERATE", False, "MODEL.RESNETS.NORM", "FrozenBN")
    inputs = random_inputs(3, sizes=((64, 96),))
    model = build_model(cfg).eval()
    model.load_state_dict(random_weights(cfg, inputs))
    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms
    outputs: list[torch.Tensor] = []
    for norm in norms:
        norm.register_forward_hook(lambda *arguments: outputs.append(arguments[2].clone()))
    with torch.no_grad():
        model(inputs)
    for output in outputs:
        variance, mean = torch.var_mean(output, (0, 2, 3))
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-3)
        assert variance.max() < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_is_measured(precision: str) -> None:
    cfg = tiny_config("MODEL.DEVICE", "cpu")
    bench = build_bench_model(cfg, size=(64, 96))
    found: dict[str, Any] = bench_model(bench, precision=precision, repeats=3)
    assert found["parameters"] >= found["trainable"] > 10_000
    parts = {
        "inference": ["inference"],
        "training": ["forward and losses", "backward", "optimizer"],
    }
    for task, names in parts.items():
        seconds = found[task]["seconds"]
        assert list(seconds) == names
        assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())
        assert found[task]["memory"]["peak"] > 0


def test_the_table() -> None:
    memory = {"start": 700.0, "peak": 1_000.0, "added": 300.0, "device_peak": 0.0}
    training = {"forward and losses": [1.0, 2.0], "backward": [2.0, 2.0], "optimizer": [0.1, 0.2]}
    result = {
        "parameters": 41_521_941,
        "trainable": 41_299_541,
        "inference": {"seconds": {"inference": [0.5, 0.4, 0.6]}, "memory": memory},
        "training": {"seconds": training, "memory": {**memory, "device_peak": 5_000.0}},
    }
    lines = steps_table(result, 2).splitlines()
    assert lines[0] == "41,521,941 parameters, 41,299,541 of them trainable"
    assert lines[3].split() == ["inference", "500", "(400..600)", "4.00", "1,000", "300"]
    assert lines[4].split()[2:] == ["3,650", "(3,100..4,200)", "0.55", "5,000"]  # of the GPU
    assert lines[5].split()[:3] == ["-", "forward", "and"]
    assert max(len(line) for line in lines) <= 100


def test_pretraining_on_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"INPUT.PATCHES.NUMBER is 10\. The benchmark measures"):
        build_bench_model(tiny_config("INPUT.PATCHES.NUMBER", 10))
