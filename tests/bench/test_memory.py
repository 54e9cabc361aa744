"""What the memory of a training step is made of."""

import pytest
import torch
from torch import Tensor, nn

from miti_detr.bench.memory import KeptTensors, measure_memory, memory_table
from miti_detr.bench.steps import build_bench_model
from tests.helpers import tiny_config


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 16)
        self.class_embed = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.class_embed(self.backbone(x).tanh()).exp()


def test_tensors_count_once_for_the_part_that_keeps_them_first() -> None:
    """Batch 5, float32. The backbone keeps its input (8 columns); tanh its output (16) outside
    of a part, which the head then shares; exp keeps its output (3). Weights do not count.
    """  # fmt: skip
    model = TwoParts()
    kept = KeptTensors(model)
    x = torch.randn(5, 8)
    with kept.counted():
        model(x).sum()
    assert kept.sizes["backbone"] == 4 * 5 * 8
    assert kept.sizes["other"] == 4 * 5 * (16 + 3)
    assert kept.sizes["heads"] == kept.sizes["encoder"] == 0
    model(x)  # is not counted any more
    assert kept.sizes["backbone"] == 4 * 5 * 8


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
    for part in ("backbone", "encoder", "decoder", "heads"):
        name = f"{part}: activations"
        assert large[name] == pytest.approx(3 * small[name], rel=0.3)
    assert large["losses: activations"] > 0
    cfg.MODEL.DETR.ACTIVATION_CHECKPOINT = True
    saved = measure_memory(build_bench_model(cfg, batch=3, size=(64, 96)))
    assert saved["encoder: activations"] < 0.5 * large["encoder: activations"]
    assert saved["heads: activations"] == pytest.approx(large["heads: activations"], rel=0.05)
    text = memory_table(large, "cpu")
    assert "optimizer state" in text
    assert "added by the process, peak" in text
