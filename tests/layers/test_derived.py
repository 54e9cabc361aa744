"""What is kept until its sources change."""

import copy
import pickle

import pytest
import torch

from miti_detr.layers.derived import Derived


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
