import math

import pytest
import torch

from miti_detr.layers import (
    Dropout,
    MultiHeadAttention,
    ReluDropout,
    dropout,
    dropout_matmul,
    relu_dropout,
)
from tests.helpers import saved_for_backward


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
    layer, x = Dropout(0.5), torch.rand(100)
    assert not torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)


def test_attention_drops_weights() -> None:
    """With values of ones and an identity as output projection, each output is the kept share of
    the attention weights over 1 - p: 1 on average.
    """
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2, dropout=0.5).train()
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


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_relu_dropout(p: float) -> None:
    x = torch.randn(64, 50)
    x[0] = 0.0
    ours, kept = seeded(lambda x: relu_dropout(x * 1, p), x)
    theirs, _ = seeded(lambda x: dropout(x.relu(), p), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert kept == x.nbytes


def test_the_relu_dropout_module_only_rectifies_in_evaluation() -> None:
    layer, x = ReluDropout(0.5), torch.randn(100)
    assert torch.equal(layer.eval()(x.clone()), x.relu())
    assert not torch.equal(layer.train()(x.clone()), x.relu())


def test_dropout_matmul() -> None:
    torch.manual_seed(0)
    weights, value = torch.randn(2, 4, 30, 20).softmax(-1), torch.randn(2, 4, 20, 8)
    ours, kept = seeded(lambda w, v: dropout_matmul(w, v, 0.25), weights, value)
    theirs, _ = seeded(lambda w, v: dropout(w, 0.25) @ v, weights, value)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert kept == weights.nbytes * 5 / 4 + value.nbytes  # a byte for each weight: kept or not


def test_dropout_matmul_takes_the_precision_of_the_values() -> None:
    weights = torch.rand(3, 4, requires_grad=True)
    value = torch.rand(4, 5, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = dropout_matmul(weights, value, 0.5)
    assert result.dtype == torch.bfloat16
    result.sum().backward()
    assert (weights.grad.dtype, value.grad.dtype) == (torch.float32, torch.bfloat16)
