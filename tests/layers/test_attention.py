import pytest
import torch
from torch import nn

from miti_detr.layers import MLP, MultiHeadAttention


def test_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    query, key, value = torch.randn(2, 5, 32), torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    expected, _ = theirs(query, key, value, key_padding_mask=padding)
    result = ours(query, key, value, ~padding[:, None, None])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("additive", [False, True])
def test_weights_equal_those_of_torch(additive):
    """With a padding mask, and with an additive one; and they are what the output is made with."""
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    query, key = torch.randn(2, 5, 32), torch.randn(2, 9, 32)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    bias = torch.randn(5, 9)
    _, expected = theirs(
        query,
        key,
        key,
        key_padding_mask=None if additive else padding,
        attn_mask=bias if additive else None,
        average_attn_weights=False,
    )
    mask = bias if additive else ~padding[:, None, None]
    weights = ours.weights(query, key, mask)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
    value = torch.nn.functional.linear(key, ours.in_proj_weight[64:], ours.in_proj_bias[64:])
    mixed = weights @ value.unflatten(-1, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(
        ours.out_proj(mixed.transpose(1, 2).flatten(2)),
        ours(query, key, key, mask),
        rtol=0,
        atol=1e-6,
    )


def test_self_attention_shortcut_equals_separate_projections():
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 2)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(attention(x, x, x), attention(x, x.clone(), x), rtol=0, atol=1e-6)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(16, 2, dropout=0.5), torch.randn(1, 7, 16)
    assert (attention(x, x, x) - attention(x, x, x)).abs().max() > 1e-3
    attention.eval()
    torch.testing.assert_close(attention(x, x, x), attention(x, x, x), rtol=0, atol=0)


def test_initialisation_is_that_of_one_packed_matrix():
    """Xavier bound of a (3C, C) matrix: sqrt(6 / 4C); of (C, C) it would be sqrt(6 / 2C)."""
    weight = MultiHeadAttention(64, 8).in_proj_weight
    bound = (6 / 256) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound


def test_width_must_divide_into_heads():
    with pytest.raises(ValueError, match=r"HIDDEN_DIM 30 is not divisible by MODEL.DETR.NHEADS 4"):
        MultiHeadAttention(30, 4)


def test_mlp_keys_and_value():
    mlp = MLP(3, 5, 2, num_layers=3)
    assert list(mlp.state_dict())[::2] == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
    x = torch.randn(4, 3)
    first, second, third = mlp.layers
    torch.testing.assert_close(mlp(x), third(second(first(x).relu()).relu()), rtol=0, atol=0)
