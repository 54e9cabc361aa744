from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.report import roofline_table
from benchmarks.roofline import PARTS, bench_roofline, flop_counter
from benchmarks.spec import make_weights
from tests.benchmarks.helpers import small_spec


def test_operations_of_attention() -> None:
    """q k^T and the weighted sum are 2 * 2 N heads Lq Lk d; backward 2.5 times that."""
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in (5, 9, 9))
    forward = 4 * 2 * 3 * 5 * 9 * 8
    with flop_counter() as counter:
        output = F.scaled_dot_product_attention(q, k, v)
        assert counter.get_total_flops() == forward
        output.sum().backward()
    assert counter.get_total_flops() == forward + forward * 5 // 2


def test_operations_of_a_linear_layer() -> None:
    """A multiply-add is two; backward has the gradients of input and weight."""
    layer, x = torch.nn.Linear(8, 5), torch.randn(7, 8, requires_grad=True)
    with flop_counter() as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * 8 * 5


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(roofline, "MATRIX", 128)
    monkeypatch.setattr(roofline, "COPY_MIB", 1)
    spec = small_spec()
    make_weights(spec, str(tmp_path / "model.pth"))
    return bench_roofline(spec, str(tmp_path / "model.pth"))


@pytest.mark.slow
def test_each_part_of_the_step(result: dict[str, Any]) -> None:
    """The heads are 4 linear layers on 2 decoder layers x 2 images x 7 queries, C = 32."""
    assert tuple(result["parts"]) == PARTS
    heads = result["parts"]["heads and losses"]["flops"]
    assert heads == 3 * 2 * (2 * 2 * 7) * (32 * 6 + 2 * 32 * 32 + 32 * 4)
    assert result["parts"]["optimizer"]["flops"] == 0
    assert min(result["rates"].values()) > 0
    total = sum(part["forward"] + part["backward"] for part in result["parts"].values())
    assert result["step"] == pytest.approx(total)  # of a single repeat


@pytest.mark.slow
def test_the_table_has_the_whole_step(result: dict[str, Any]) -> None:
    result["parts"] = {
        "a": {"forward": 1.0, "backward": 2.0, "flops": 6e9, "share": 0.5},
        "b": {"forward": 1.0, "backward": 0.0, "flops": 0, "share": 0.1},
    }
    lines = roofline_table(result).splitlines()
    assert lines[2].split() == ["a", "1,000.0", "2,000.0", "75%", "6.0", "2.0", "50%"]
    assert lines[3].split() == ["b", "1,000.0", "25%", "10%"]
    # (3 s at 0.5 + 1 s at 0.1) / 4 s
    assert lines[4].split() == ["whole", "step", "2,000.0", "2,000.0", "100%", "6.0", "1.5", "40%"]
    assert max(len(line) for line in lines) <= 100
