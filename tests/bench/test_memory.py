"""What the memory of a training step is made of."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr.bench.inputs import random_inputs
from miti_detr.bench.memory import KeptTensors, measure_memory, memory_table
from miti_detr.bench.steps import build_bench_model
from tests.helpers import tiny_config
from tests.modeling.deformable.helpers import tiny


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 16)
        self.class_embed = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.class_embed(self.backbone(x).tanh()).exp()


def test_tensors_count_once_for_the_part_that_keeps_them_first() -> None:
    """Batch 5, float32. The backbone keeps its input (8 columns), which counts by itself; tanh its
    output (16) outside of a part, which the head then shares; exp keeps its output (3). Weights do
    not count.
    """
    model = TwoParts()
    kept = KeptTensors(model)
    x = torch.randn(5, 8)
    with kept.counted():
        model(x).sum()
    assert kept.sizes["input"] == 4 * 5 * 8
    assert kept.sizes["other"] == 4 * 5 * (16 + 3)
    assert kept.sizes["backbone"] == kept.sizes["heads"] == kept.sizes["encoder"] == 0
    model(torch.randn(6, 8))  # is not counted any more
    assert kept.sizes["input"] == 4 * 5 * 8


def test_lists_of_layers_and_of_heads_are_parts() -> None:
    """Deformable-DETR has no forward pass of the encoder, the decoder or all heads as a whole."""
    model = build_model(tiny("two_stage"))
    kept = KeptTensors(model)
    with kept.counted():
        model.train()(random_inputs(2, batch=1, sizes=((64, 96),), objects=2))
    assert min(kept.sizes.values()) > 0
    assert kept.sizes["encoder"] > kept.sizes["other"]


@pytest.mark.slow
def test_a_training_step_by_part() -> None:
    cfg = tiny_config("MODEL.DEVICE", "cpu", "MODEL.DETR.ENC_LAYERS", 2)
    small, large = (
        measure_memory(build_bench_model(cfg, batch=batch, size=(64, 96))) for batch in (1, 3)
    )
    model = build_bench_model(cfg, batch=1, size=(64, 96)).model
    numbers = [x.numel() for x in model.parameters() if x.requires_grad]
    assert small["gradients"] == pytest.approx(4 * sum(numbers) / 2**20)
    assert small["optimizer state"] == pytest.approx(2 * small["gradients"], rel=1e-2)
    assert small["weights"] >= small["gradients"]
    assert large["input"] == pytest.approx(3 * 4 * 3 * 64 * 96 / 2**20)
    for part in ("backbone", "encoder", "decoder", "heads"):
        name = f"{part}: activations"
        assert large[name] == pytest.approx(3 * small[name], rel=0.3)
    assert large["losses: activations"] > 0
    cfg.MODEL.DETR.ACTIVATION_CHECKPOINT = True
    saved = measure_memory(build_bench_model(cfg, batch=3, size=(64, 96)))
    assert saved["encoder: activations"] < 0.5 * large["encoder: activations"]
    assert saved["heads: activations"] == pytest.approx(large["heads: activations"], rel=0.05)
    cfg.MODEL.DETR.ACTIVATION_CHECKPOINT_IN = ("transformer.encoder",)
    saved = measure_memory(build_bench_model(cfg, batch=3, size=(64, 96)))
    assert saved["encoder: activations"] < 0.5 * large["encoder: activations"]
    assert saved["backbone: activations"] == large["backbone: activations"]
    text = memory_table(large, "cpu")
    assert "optimizer state" in text
    assert "added by the process, peak" in text
    assert max(map(len, text.splitlines())) <= 80
