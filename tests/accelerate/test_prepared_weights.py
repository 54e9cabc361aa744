"""Weights that are folded and cast together: the numbers, and the number of operations."""

import collections
import copy
import threading

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn
from torch.nn.utils import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from miti_detr import add_miti_detr_config
from miti_detr.accelerate import accelerate, prepared_weights
from tests.accelerate.test_accelerate import INPUTS, WIDE, edit_in_place
from tests.fill import filled
from tests.helpers import ROOT, tiny_config

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


def double_before_forward(layer):
    """Through ``.data``, which leaves no trace in a version counter."""

    def double(layer, _):
        layer.weight.data.mul_(2.0)

    layer.register_forward_pre_hook(double)


def double_in_parent(layer):
    """After the weights of the part were prepared, but by no hook of the layer."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.no_grad():
                self.layer.weight.mul_(2.0)
            return self.layer(x)

    return Doubling()


def in_float32(layer):
    class InFloat32(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.layer(x.float())

    return InFloat32()


def double_parametrized(layer):
    class Double(nn.Module):
        def forward(self, weight):
            return 2.0 * weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Double())


@pytest.mark.parametrize(
    "change",
    [double_before_forward, double_in_parent, double_parametrized, in_float32, spectral_norm],
)
def test_layers_that_change_within_the_part(change):
    """They use the weights and the precision that they have when they are called."""
    results = []
    for made in pair():
        layers = made.transformer.encoder.layers[0]
        torch.manual_seed(0)
        layers.linear1 = change(layers.linear1) or layers.linear1
        results.append([step(made) for _ in range(2)])
    unchanged, _ = step(pair()[0])
    for (losses, gradients), (expected_losses, expected) in zip(*results, strict=True):
        torch.testing.assert_close(losses, expected_losses, rtol=2e-3, atol=2e-3)
        assert gradients.keys() == expected.keys()
        names = [name for name in expected if "encoder.layers.0.linear1" in name]
        assert names
        for name in names:
            error = (gradients[name] - expected[name]).norm()
            assert error <= LIMIT * expected[name].norm() + 1e-5, name
        total, before = sum(losses.values()), sum(unchanged.values())
        assert change is in_float32 or abs(total - before) > 5e-3


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


@pytest.mark.slow
def test_number_of_operators_of_r50():
    """Of forward and backward of one step, views apart; there were 2,309 with 560 casts."""
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/coco/miti_detr_R50.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DETR.DROPOUT", 0.0])
    made = build_model(cfg)
    step(made)
    with Count() as count:
        step(made)
    views = ("view", "detach", "alias", "as_strided", "t", "transpose", "permute", "unsqueeze")
    views += ("squeeze", "select", "slice", "expand", "split_with_sizes", "unbind", "_unsafe_view")
    assert sum(number for name, number in count.names.items() if name not in views) <= 1500
    assert count.names["_to_copy"] <= 150


def test_a_step_copies_to_the_host_once(monkeypatch):
    """Everything else that looks at values looks at what is on the host already."""
    ours, _ = pair()
    copied = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copied.append(x.shape) or cpu(x))
    step(ours)
    assert copied == [(2, 2, 40, 2)]  # costs: layers, images, queries, objects


def test_a_second_step_compiles_nothing(monkeypatch):
    """In the first step of a thread nothing was ever prepared; without generating code."""
    monkeypatch.setattr(prepared_weights, "_current", threading.local())
    model = accelerate(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
    model.compile(backend="eager")
    x = torch.ones(2, 4)
    first = model(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(model(x), first, rtol=0, atol=0)
