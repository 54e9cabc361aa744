"""Weights that are folded and cast together: the numbers, and the number of operations."""

import collections
import copy

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from miti_detr.accelerate import accelerate, prepared_weights
from tests.accelerate.test_accelerate import INPUTS, WIDE, edit_in_place
from tests.fill import filled
from tests.helpers import tiny_config

WITHOUT = ("parts with weights prepared together",)
# Relative; weights are rounded alike, and sums of gradients in another order.
LIMIT = 0.02


def pair():
    plain = build_model(tiny_config(*WIDE, "MODEL.ACCELERATE", False))
    plain.load_state_dict(filled(plain.state_dict()))
    return accelerate(copy.deepcopy(plain)), accelerate(copy.deepcopy(plain), without=WITHOUT)


def step(made):
    made.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        losses = made(INPUTS)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


def test_losses_and_gradients_of_a_step():
    """Also after the weights have changed, and with gradients added to those of before."""
    ours, other = pair()
    for _ in range(2):
        (losses, gradients), (expected_losses, expected) = step(ours), step(other)
        torch.testing.assert_close(losses, expected_losses, rtol=LIMIT, atol=LIMIT)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (gradients[name] - gradient).norm()
            assert error <= LIMIT * gradient.norm() + 1e-5, (name, error, gradient.norm())
            assert gradients[name].dtype == torch.float32
        for made in (ours, other):
            edit_in_place(made)
    assert prepared_weights.prepared(ours.transformer.encoder.layers[0].linear1) is None


def test_parts():
    ours, _ = pair()
    hooked = [
        n
        for n, m in ours.named_modules()
        if prepared_weights._prepare in m._forward_pre_hooks.values()
    ]
    assert hooked == ["backbone", "transformer", "bbox_embed"]
    assert "3 parts with weights prepared together" in str(ours.acceleration)
    accelerate(ours)
    hooks = [hook for m in ours.modules() for hook in m._forward_pre_hooks.values()]
    assert hooks.count(prepared_weights._prepare) == 3


def test_a_failed_forward_pass_leaves_nothing():
    ours, _ = pair()
    ours.train()
    wrong = torch.rand(1, 7, 2, 2), None, torch.rand(5, 128), torch.rand(1, 7, 2, 2)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        ours.transformer(*wrong)
    layer = ours.transformer.encoder.layers[0].linear1
    assert prepared_weights.prepared(layer) is None


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_number_of_casts_of_a_step():
    """Without preparation every weight is cast, and so is its gradient."""
    ours, other = pair()
    counts = []
    for made in (ours, other):
        step(made)
        with Count() as count:
            step(made)
        counts.append(count.names)
    layers = sum(isinstance(m, nn.Linear) for m in ours.transformer.modules())
    assert counts[0]["_to_copy"] < counts[1]["_to_copy"] - 4 * layers
    assert counts[0]["slice_backward"] <= counts[1]["slice_backward"]


def test_a_step_copies_to_the_host_once(monkeypatch):
    """Everything else that looks at values looks at what is on the host already."""
    ours, _ = pair()
    copied = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copied.append(x.shape) or cpu(x))
    step(ours)
    assert copied == [(2, 2, 40, 2)]  # costs: layers, images, queries, objects
