import math

import pytest
import torch
from torch import nn

from miti_detr.accelerate import accelerate
from miti_detr.layers import MultiHeadAttention, attention_weights
from tests.helpers import saved_for_backward


def dropout(x, p):
    return accelerate(nn.Dropout(p))(x)


def relu_dropout(x, p):
    return accelerate(nn.Sequential(nn.ReLU(), nn.Dropout(p)))(x)


def dropout_attention(q, k, v, mask, p):
    with torch.random.fork_rng():  # its initialisation draws random numbers
        module = accelerate(MultiHeadAttention(q.shape[1] * q.shape[-1], q.shape[1], dropout=p))
    return module._attend(q, k, v, mask)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(1001, 1003), (7,)])
def test_share_and_scale(p: float, shape: tuple[int, ...]) -> None:
    """Elements are 0 or x / (1 - p); n of them are 0 with mean p n and variance p (1 - p) n."""
    torch.manual_seed(0)
    x = torch.rand(shape) + 1
    found = dropout(x, p)
    kept = found != 0
    torch.testing.assert_close(found[kept], (x / (1 - p))[kept], rtol=1e-4, atol=0)
    deviation = math.sqrt(p * (1 - p) * x.numel())
    assert abs(int((~kept).sum()) - p * x.numel()) < 4 * deviation


def test_neighbours_are_independent() -> None:
    """Four elements come from one draw; both of two at any distance are 0 with probability p^2."""
    torch.manual_seed(0)
    zero = dropout(torch.ones(2**20), 0.1) == 0
    for distance in (1, 2, 3, 4):
        both = (zero[distance:] & zero[:-distance]).double().mean()
        torch.testing.assert_close(both, torch.tensor(0.01).double(), rtol=0, atol=5e-4)


def test_seed_and_gradient() -> None:
    """The seed decides; the gradient passes where elements were kept, with their scale."""
    x = torch.rand(64, 64, requires_grad=True)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(dropout(x, 0.25))
    assert torch.equal(*results)
    results[0].sum().backward()
    torch.testing.assert_close(x.grad, (results[0] != 0).float() / 0.75)


def test_the_module_is_idle_in_evaluation() -> None:
    layer, x = accelerate(nn.Dropout(0.5)), torch.rand(100)
    assert not torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)


def test_attention_drops_weights() -> None:
    """With values of ones and an identity as output projection, each output is the kept share of
    the attention weights over 1 - p: 1 on average.
    """
    torch.manual_seed(0)
    attention = accelerate(MultiHeadAttention(8, 2, dropout=0.5)).train()
    with torch.no_grad():
        attention.in_proj_weight[16:] = 0
        attention.in_proj_bias[16:] = 1
        attention.out_proj.weight.copy_(torch.eye(8))
        output = attention(*(torch.rand(4, 256, 8) for _ in range(3)))
    assert output.std() > 0.01
    torch.testing.assert_close(output.mean(), torch.tensor(1.0), rtol=0, atol=0.01)


def seeded(function, *tensors):
    """Result and gradients of a function of fresh leaves, and the bytes kept for the backward."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    torch.manual_seed(3)
    with saved_for_backward() as saved:
        y = function(*leaves)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    kept = sum(t.untyped_storage().nbytes() for t in saved.values())
    own = y.nbytes  # the factors of the loss
    return (y.detach(), *(t.grad for t in leaves)), kept - own


@pytest.mark.parametrize("p", [0.25])
def test_relu_dropout(p: float) -> None:
    x = torch.randn(64, 50)
    x[0] = 0.0
    ours, kept = seeded(lambda x: relu_dropout(x * 1, p), x)
    theirs, _ = seeded(lambda x: dropout(x.relu(), p), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert kept == x.nbytes


def test_the_relu_dropout_module_only_rectifies_in_evaluation() -> None:
    layer = accelerate(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))
    x = torch.randn(100)
    assert torch.equal(layer.eval()(x.clone()), x.relu())
    assert not torch.equal(layer.train()(x.clone()), x.relu())


def plain_attention(p, mask=None):
    """What ``dropout_attention`` computes, step by step."""
    return lambda q, k, v: dropout(attention_weights(q, k, mask), p) @ v


MASKS = {
    "none": None,
    "bool": torch.arange(20).view(1, 1, 1, 20) < torch.tensor([20, 13]).view(2, 1, 1, 1),
    "float": torch.arange(600.0).view(1, 1, 30, 20).cos(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_dropout_attention(mask: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 30, 8), torch.randn(2, 4, 20, 8), torch.randn(2, 4, 20, 8)
    ours, kept = seeded(lambda q, k, v: dropout_attention(q, k, v, mask, 0.25), q, k, v)
    theirs, _ = seeded(plain_attention(0.25, mask), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    dropped_or_not = 2 * 4 * 30 * 20  # a byte for each weight
    inputs = sum(t.nbytes for t in (q, k, v, mask) if t is not None)
    assert kept == dropped_or_not + inputs


def test_dropout_attention_passes_gradients_to_a_learned_mask() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind()
    mask = torch.zeros(9, 9, requires_grad=True)
    dropout_attention(q, k, v, mask, 0.1).square().sum().backward()
    assert mask.grad is not None
    assert mask.grad.abs().sum() > 0


def test_dropout_attention_under_autocast() -> None:
    """Backward, too, in the precision of each step of the plain path."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 2, 4, 30, 8, dtype=torch.bfloat16).unbind()

    def under_autocast(function):
        def run(*leaves):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*leaves)

        return run

    ours, _ = seeded(under_autocast(lambda *x: dropout_attention(*x, None, 0.25)), *tensors)
    theirs, _ = seeded(under_autocast(plain_attention(0.25)), *tensors)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.02)
