"""Folded frozen batch norm: the same function, keys and gradients."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_resnet_backbone
from torch import nn

from miti_detr.accelerate.frozen_batch_norm import FoldedConv2d
from miti_detr.accelerate.frozen_batch_norm import apply as fold_frozen_batch_norm
from tests.fill import filled
from tests.helpers import saved_for_backward, tiny_config


def folded_twin(conv):
    """A folded copy that shares parameters and norm."""
    twin = copy.copy(conv)
    twin._parameters, twin._modules = dict(conv._parameters), dict(conv._modules)
    assert fold_frozen_batch_norm(twin) == 1
    return twin


def resnet(depth=50, norm="FrozenBN"):
    cfg = tiny_config(
        *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256),
        *("MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.BACKBONE.FREEZE_AT", 2),
    )
    model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    model.load_state_dict(filled(model.state_dict(), "backbone."))
    return model


@pytest.mark.slow
def test_resnet_is_the_same_function_with_the_same_keys_and_gradients():
    plain, folded = resnet().double(), resnet().double()
    assert fold_frozen_batch_norm(folded) == 53
    assert list(folded.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    outputs = [model(x)["res5"] for model in (plain, folded)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)
    gradients = []
    for model, output in zip((plain, folded), outputs, strict=True):
        (output**2).mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_other_norms_are_left_alone():
    model = resnet(norm="GN")
    assert fold_frozen_batch_norm(model) == 0
    assert not any(isinstance(m, FoldedConv2d) for m in model.modules())


@pytest.fixture
def pair():
    """A convolution with bias, norm and activation, and its folded twin with the same weights."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(4)
    conv = Conv2d(3, 4, 3, padding=1, norm=norm, activation=nn.ReLU())
    norm.load_state_dict(filled(norm.state_dict(), "backbone.bn."))
    return conv.eval(), folded_twin(conv)


def test_cached_weights_follow_every_change(pair):
    """After an in-place step, a load, a cast: never a stale weight."""
    conv, folded = pair
    x = torch.randn(1, 3, 5, 5)

    def check(dtype=torch.float32):
        with torch.no_grad():
            expected, result = conv(x.to(dtype)), folded(x.to(dtype))
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        return result

    first = check()
    with torch.no_grad():
        conv.weight.add_(1.0)
    assert (check() - first).abs().max() > 0.1
    conv.norm.running_mean.add_(1.0)
    check()
    conv.bias.data = torch.ones(4)
    folded.bias = conv.bias
    check()
    state = filled(conv.state_dict(), "other.")
    folded.load_state_dict(state)
    check()
    with torch.inference_mode():
        folded(x)
    folded(x.requires_grad_()).sum().backward()
    assert conv.weight.grad is not None


def test_autocast_uses_its_precision(pair):
    conv, folded = pair
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert folded(x).dtype == torch.bfloat16
        torch.testing.assert_close(folded(x), conv(x), rtol=0.05, atol=0.05)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), conv(x), rtol=1e-5, atol=1e-6)


def test_frozen_weights_can_still_pass_gradients_on(pair):
    _, folded = pair
    folded.weight.requires_grad_(False)
    folded.bias.requires_grad_(False)
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    with torch.inference_mode():
        folded(x.detach())  # fills the cache
    folded(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolutions_are_the_same_function(stride):
    """And oneDNN's, with one thread and one image, too."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(64)
    conv = Conv2d(32, 64, 1, stride=stride, norm=norm)
    norm.load_state_dict(filled(norm.state_dict(), "backbone.bn."))
    folded = folded_twin(conv)
    x = torch.randn(1, 32, 50, 60)
    torch.testing.assert_close(folded(x), conv(x), rtol=1e-4, atol=1e-4)


def test_padding_by_name():
    """The backward pass has it, too."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(4)
    conv = Conv2d(3, 4, 3, padding="same", norm=norm)
    norm.load_state_dict(filled(norm.state_dict(), "backbone.bn."))
    gradients = []
    for layer in (conv, folded_twin(conv)):
        conv.zero_grad()
        layer(torch.ones(1, 3, 5, 5)).square().sum().backward()
        gradients.append(conv.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_gradients_and_what_is_kept_for_them(pair):
    """Inputs and the parameter itself, but not its scaled twin."""
    results = []
    for conv in pair:
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
        conv.zero_grad()
        with saved_for_backward() as saved:
            conv(x).square().sum().backward()
        results.append((x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    weight = pair[1].weight
    of_weights = [pointer for pointer, t in saved.items() if t.shape == weight.shape]
    assert of_weights == [weight.untyped_storage().data_ptr()]


GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "bias": True},
    {"kernel_size": 7, "stride": 2, "padding": 3},
]


def folded_conv(**geometry):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(16)
    conv = Conv2d(8, 16, **{"bias": False, **geometry}, norm=norm)
    norm.load_state_dict(filled(norm.state_dict(), "backbone.bn."))
    return conv, folded_twin(conv)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_relu_and_addition_without_gradient(geometry, layout):
    """By oneDNN in one pass, with weights packed for the first of several sizes."""
    conv, folded = folded_conv(**geometry)
    for size in ((2, 8, 20, 30), (1, 8, 33, 17), (3, 8, 1, 1), (0, 8, 9, 9)):
        x = torch.randn(size).contiguous(memory_format=layout)
        expected = conv(x)
        other = torch.randn(expected.shape).contiguous(memory_format=layout)
        added = (expected + other).relu()
        with torch.no_grad():
            torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(folded(x, relu=True), expected.relu(), rtol=1e-4, atol=1e-4)
            ours = folded(x, add=other.clone(), relu=True)
            torch.testing.assert_close(ours, added, rtol=1e-4, atol=1e-4)
            summed = folded(x, add=other.clone())
            torch.testing.assert_close(summed, expected + other, rtol=1e-4, atol=1e-4)


def test_relu_and_addition_in_training():
    """Gradients of all, and nothing overwritten."""
    conv, folded = folded_conv(kernel_size=3, padding=1)
    x, other = torch.randn(2, 8, 9, 9), torch.randn(2, 16, 9, 9)
    results = []
    for layer in (
        lambda x, other: (conv(x) + other).relu(),
        lambda x, other: folded(x, add=other, relu=True),
    ):
        conv.zero_grad()
        leaves = [x.clone().requires_grad_(), other.clone().requires_grad_()]
        y = layer(*leaves)
        y.square().sum().backward()
        assert torch.equal(leaves[1], other)
        results.append((y.detach(), *(leaf.grad for leaf in leaves), conv.weight.grad.clone()))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_input_of_another_precision_is_refused_as_by_torch(pair):
    for conv in pair:
        with torch.no_grad(), pytest.raises(RuntimeError, match="type"):
            conv(torch.ones(1, 3, 5, 5, dtype=torch.float64))


def test_copies_and_pickles_of_a_used_convolution(pair):
    _, folded = pair
    folded.activation = None
    x = torch.randn(1, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = folded(x)
        for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert torch.equal(twin(x), expected)
            twin.weight.zero_()
            assert not torch.equal(twin(x), expected)
        assert torch.equal(folded(x), expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_strided_pointwise_convolution_of_few_channels_trains(layout):
    """In channels_last layout torch's own corrupts memory in its backward pass."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(16)
    conv = Conv2d(8, 16, 1, stride=2, bias=False, norm=norm)
    norm.load_state_dict(filled(norm.state_dict(), "backbone.bn."))
    folded, plain = folded_twin(conv), copy.deepcopy(conv).double()
    for size in ((2, 8, 20, 28), (1, 8, 7, 9), (32, 8, 40, 56)):
        x = torch.randn(size)
        leaves = [x.contiguous(memory_format=layout), x.double()]
        for layer, leaf in zip((folded, plain), leaves, strict=True):
            layer.zero_grad()
            layer(leaf.requires_grad_()).square().mean().backward()
        pairs = (leaves[0].grad, leaves[1].grad), (folded.weight.grad, plain.weight.grad)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
