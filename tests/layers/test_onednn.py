"""When oneDNN's own operators are used."""

import pytest
import torch

from miti_detr.layers.onednn import is_for_onednn
from tests.helpers import mkldnn_runs

needs_mkldnn = pytest.mark.skipif(not mkldnn_runs(), reason="no oneDNN for x86")


@needs_mkldnn
def test_for_onednn_are_calls_without_gradient_in_its_precisions() -> None:
    x, weight = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    assert is_for_onednn(x, torch.float32, None)
    assert not is_for_onednn(x, torch.float32, weight)
    with torch.no_grad():
        assert is_for_onednn(x, torch.float32, weight)
        assert not is_for_onednn(x, torch.float64, weight)
        assert not is_for_onednn(x, torch.float16, weight)
        assert not is_for_onednn(x[:0], torch.float32, weight)
        assert not is_for_onednn(x.to("meta"), torch.float32, weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not is_for_onednn(x, torch.float32, weight)
