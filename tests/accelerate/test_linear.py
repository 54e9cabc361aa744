"""Linear layers as convolutions: the same function, gradients and parameters as torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miti_detr.accelerate import accelerate
from miti_detr.accelerate import linear as technique
from miti_detr.accelerate.kept import Kept

WIDE = 640  # with 160 outputs and 100 rows large enough for a convolution


def linear(x, weight, bias=None):
    return technique.linear(x, weight, bias, kept=Kept())


def Linear(*args, **kwargs):
    return accelerate(nn.Linear(*args, **kwargs))


def assert_equal_but_for_rounding(ours, theirs):
    largest = theirs.detach().abs().max().item() if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-6 * largest)


def arguments(*shape, out=160):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, requires_grad=True)
        for size in (shape, (out, shape[-1]), (out,))
    )
    return x, weight, bias


@pytest.mark.parametrize(
    "shape",
    [(100, WIDE), (2, 50, WIDE), (2, 3, 20, WIDE), (2, 50, 7), (3, WIDE), (WIDE,), (0, WIDE)],
)
def test_same_values_and_gradients_as_torch(shape):
    results = []
    for function in (linear, F.linear):
        x, weight, bias = arguments(*shape)
        y = function(x, weight, bias)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_equal_but_for_rounding(ours, theirs)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:, :1].expand(-1, 6, -1)],
    ids=["transposed", "strided", "expanded"],
)
def test_any_layout(change):
    x, weight, bias = arguments(40, 6, WIDE)
    assert_equal_but_for_rounding(
        linear(change(x), weight, bias), F.linear(change(x), weight, bias)
    )
    rows = weight[1:150]
    assert_equal_but_for_rounding(linear(change(x), rows), F.linear(change(x), rows))


def test_the_result_is_contiguous_for_the_tokens_of_a_single_feature_map():
    """As attention needs it to do without weights in memory."""
    x, weight, bias = arguments(1, 100, WIDE)
    tokens = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not tokens.is_contiguous()
    assert linear(tokens, weight, bias).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_torchs_own(dtype):
    x, weight, bias = (t.detach().to(dtype) for t in arguments(100, WIDE))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_autocast_is_torchs_own():
    x, weight, bias = arguments(100, WIDE)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x, weight, bias))


def test_gradients_of_gradients():
    results = []
    for function in (linear, F.linear):
        x, weight, bias = arguments(2, 50, WIDE)
        y = function(x, weight, bias).square().sum()
        (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        gradient.square().sum().backward()
        results.append((x.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_equal_but_for_rounding(ours, theirs)


def test_the_module_is_torchs_in_all_but_the_forward_pass():
    torch.manual_seed(0)
    ours = Linear(WIDE, 160)
    torch.manual_seed(0)
    theirs = nn.Linear(WIDE, 160)
    assert isinstance(ours, nn.Linear)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    x = torch.randn(100, WIDE)
    assert_equal_but_for_rounding(ours(x), theirs(x))


def test_exporters_see_a_linear_layer():
    graph = torch.jit.trace(Linear(WIDE, 160), torch.randn(100, WIDE)).inlined_graph
    kinds = {node.kind() for node in graph.nodes()}
    assert "aten::linear" in kinds
    assert not any("conv" in kind for kind in kinds)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(100, WIDE), (2, 50, WIDE), (2, 3, WIDE)])
def test_autocast_without_gradient(bias, shape):
    """The same numbers up to rounding to bfloat16, and never those of earlier weights."""
    torch.manual_seed(0)
    layer = Linear(WIDE, 160, bias=bias)
    x = torch.randn(shape)
    for _ in range(2):
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16):
                ours, theirs = layer(x), F.linear(x, layer.weight, layer.bias)
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        with torch.no_grad():
            layer.weight.mul_(-2)
