"""When oneDNN's own operators are used."""

import pytest
import torch

from miti_detr.accelerate.onednn import can_fuse
from tests.helpers import mkldnn_runs

needs_mkldnn = pytest.mark.skipif(not mkldnn_runs(), reason="no oneDNN for x86")


@needs_mkldnn
def test_fused_are_calls_without_gradient_in_its_precisions() -> None:
    x, weight = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    assert can_fuse(x, torch.float32, None)
    assert not can_fuse(x, torch.float32, weight)
    with torch.no_grad():
        assert can_fuse(x, torch.float32, weight)
        assert not can_fuse(x, torch.float64, weight)
        assert not can_fuse(x, torch.float16, weight)
        assert not can_fuse(x[:0], torch.float32, weight)
        assert not can_fuse(x.to("meta"), torch.float32, weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not can_fuse(x, torch.float32, weight)
