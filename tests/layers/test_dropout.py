import math

import pytest
import torch

from miti_detr.layers import Dropout, MultiHeadAttention, dropout


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
