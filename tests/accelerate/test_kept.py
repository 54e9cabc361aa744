"""What is kept until its sources change."""

import copy
import pickle

import pytest
import torch

from miti_detr.accelerate.kept import Kept


def test_a_value_is_made_again_when_its_sources_change() -> None:
    weight, bias = torch.ones(3), torch.ones(3)
    kept: Kept[torch.Tensor] = Kept()

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


def test_a_value_has_no_gradient_and_is_no_inference_tensor() -> None:
    weight = torch.ones(3, requires_grad=True)
    kept: Kept[torch.Tensor] = Kept()
    with torch.inference_mode():
        value = kept.get(lambda: weight * 2, (weight,))
    assert not value.requires_grad
    assert not value.is_inference()


def test_sources_made_in_inference_mode_are_never_stale() -> None:
    kept: Kept[torch.Tensor] = Kept()
    with torch.inference_mode():
        weight = torch.ones(3)
        for expected in (2.0, 4.0):
            value = kept.get(lambda: weight * 2, (weight,))
            assert torch.equal(value, torch.full((3,), expected))
            weight.mul_(2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_empty(copied) -> None:
    weight = torch.ones(3)
    kept: Kept[torch.Tensor] = Kept()
    kept.get(lambda: weight, (weight,))
    made = copied(kept).get(lambda: weight + 1, (weight,))
    assert torch.equal(made, torch.full((3,), 2.0))


def test_changes_without_a_version_are_noticed() -> None:
    """Small tensors are compared, large ones by a product with random numbers."""
    for shape in ((3,), (64, 128), (8, 32, 5, 5), (37, 113), (128, 64, 3, 3), (64,) * 3):
        weight = torch.rand(shape)
        kept: Kept[torch.Tensor] = Kept()
        for _ in range(3):
            assert torch.equal(kept.get(lambda w=weight: w * 2, (weight,)), weight * 2)
            weight.data.view(-1)[-1] += 1e-3
        weight.data.copy_(weight.flip(0))
        assert torch.equal(kept.get(lambda w=weight: w * 2, (weight,)), weight * 2)


def test_values_that_are_not_numbers_are_never_kept() -> None:
    weight = torch.full((100, 100), torch.nan)
    kept: Kept[torch.Tensor] = Kept()
    first = kept.get(lambda: weight * 2, (weight,))
    assert kept.get(lambda: weight * 2, (weight,)) is not first
