"""What is kept of weights, and when oneDNN's own operators are used."""

import copy
import pickle

import pytest
import torch

from miti_detr.layers.onednn import Derived, is_for_onednn
from tests.helpers import mkldnn_runs

needs_mkldnn = pytest.mark.skipif(not mkldnn_runs(), reason="no oneDNN for x86")


def test_derived_is_made_again_when_its_sources_change() -> None:
    weight, bias = torch.ones(3), torch.ones(3)
    kept: Derived[torch.Tensor] = Derived()

    def get(*others: object) -> torch.Tensor:
        return kept.get(lambda: weight + bias, (weight, bias, None), *others)

    assert get() is get()
    assert torch.equal(get(), torch.full((3,), 2.0))
    bias.add_(1.0)
    assert torch.equal(get(), torch.full((3,), 3.0))
    weight = torch.zeros(3)
    assert torch.equal(get(), torch.full((3,), 2.0))
    first = get()
    assert get("other") is not first


def test_derived_has_no_gradient_and_is_no_inference_tensor() -> None:
    weight = torch.ones(3, requires_grad=True)
    kept: Derived[torch.Tensor] = Derived()
    with torch.inference_mode():
        value = kept.get(lambda: weight * 2, (weight,))
    assert not value.requires_grad
    assert not value.is_inference()


def test_sources_made_in_inference_mode_are_never_stale() -> None:
    kept: Derived[torch.Tensor] = Derived()
    with torch.inference_mode():
        weight = torch.ones(3)
        for expected in (2.0, 4.0):
            value = kept.get(lambda: weight * 2, (weight,))
            assert torch.equal(value, torch.full((3,), expected))
            weight.mul_(2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_derived_are_empty(copied) -> None:
    weight = torch.ones(3)
    kept: Derived[torch.Tensor] = Derived()
    kept.get(lambda: weight, (weight,))
    made = copied(kept).get(lambda: weight + 1, (weight,))
    assert torch.equal(made, torch.full((3,), 2.0))


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
