"""Layers and stacks against the published implementations, and the residual rule itself."""

import pytest
import torch
from torch import nn

from miti_detr.accelerate import accelerate
from miti_detr.modeling.transformer import (
    DecoderLayer,
    EncoderLayer,
    LayerResidual,
    ResidualTransformer,
)
from tests.fill import filled
from tests.helpers import load_golden

LAYERS, TRANSFORMER = load_golden("layers"), load_golden("transformer")
VARIANTS = ["none", "before_norm"]
ACCELERATE = [False]  # of the models below; see the fixture
SMALL = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.1}


@pytest.fixture(params=[False, True], ids=["plain", "accelerated"], autouse=True)
def _speed(request):
    """Every test of this module runs with the plain and with the accelerated model."""
    ACCELERATE[0] = request.param


def made_fast(model):
    return accelerate(model) if ACCELERATE[0] else model


def transformer(**changes):
    arguments = {
        **SMALL,
        "num_encoder_layers": 3,
        "num_decoder_layers": 3,
        "pre_norm": False,
        "layer_residual": "none",
    }
    return made_fast(ResidualTransformer(**{**arguments, **changes}).eval())


def layer(kind, variant, norm, dtype):
    made = kind(**SMALL, pre_norm=norm == "pre", layer_residual=variant)
    stack = "encoder" if kind is EncoderLayer else "decoder"
    made.load_state_dict(filled(made.state_dict(), f"transformer.{stack}.layers.0."))
    return made_fast(made.eval().to(dtype))


def inputs(dtype, *names):
    """Golden inputs, (n, B, d) to (B, n, d)."""
    return [LAYERS[f"in.{name}"].to(dtype).transpose(0, 1) for name in names]


def assert_equals_golden(result, expected, dtype):
    if dtype == torch.float64:
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    else:
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(result, expected.float(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_layer_equals_published(variant, norm, dtype):
    encoder = layer(EncoderLayer, variant, norm, dtype)
    src, pos = inputs(dtype, "src", "pos")
    padding = LAYERS["in.padding_mask"]
    for name, result in {
        "masked": encoder(src, pos, ~padding[:, None, None]),
        "plain": encoder(src),
    }.items():
        expected = LAYERS[f"encoder.{variant}.{norm}.{name}"].transpose(0, 1)
        assert_equals_golden(result, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_layer_equals_published(variant, norm, dtype):
    decoder = layer(DecoderLayer, variant, norm, dtype)
    tgt, memory, pos, query_pos = inputs(dtype, "tgt", "memory", "pos", "query_pos")
    attend = ~LAYERS["in.padding_mask"][:, None, None]
    blocks = LAYERS["in.tgt_mask"].to(dtype)
    for name, result in {
        "masked": decoder(tgt, memory, memory + pos, query_pos, attend),
        "plain": decoder(tgt, memory, memory),
        "blockmask": decoder(tgt, memory, memory + pos, query_pos, attend, blocks),
    }.items():
        expected = LAYERS[f"decoder.{variant}.{norm}.{name}"].transpose(0, 1)
        assert_equals_golden(result, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformer_equals_published(variant, dtype):
    model = transformer(d_model=64, dim_feedforward=128, layer_residual=variant)
    model.load_state_dict(filled(model.state_dict(), "transformer."))
    model.to(dtype)
    src, embed, pos = (
        TRANSFORMER[f"in.{name}"].to(dtype) for name in ("src", "query_embed", "pos")
    )
    states, memory = model(src, TRANSFORMER["in.mask"], embed, pos)
    assert_equals_golden(states, TRANSFORMER[f"{variant}.post.hs"], dtype)
    assert_equals_golden(memory, TRANSFORMER[f"{variant}.post.memory"], dtype)


def test_diagram_of_residual():
    """The six formulas of the module docstring, for x = 1, y + F = 10, z = 5, LN = "times 2"."""
    x, total, normed = torch.ones(1), torch.full((1,), 10.0), torch.full((1,), 5.0)

    class Double(nn.Module):
        def forward(self, value):
            return 2 * value

    post = {"none": 20.0, "before_norm": 22.0, "after_norm": 21.0}
    pre = {"none": 10.0, "before_norm": 15.0, "after_norm": 11.0}
    for placement in post:
        rule = LayerResidual(placement)
        assert rule.finish_post_norm(x, total, Double()).item() == post[placement]
        assert rule.finish_pre_norm(x, normed, total).item() == pre[placement]


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("placement", ["before_norm", "after_norm"])
def test_strength_scales_the_joined_input_alone(placement, norm):
    """s = 0 is DETR to the bit, s = 0.25 the formulas of the module docstring with 0.25 x."""
    x, total, normed = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    last = nn.LayerNorm(8)

    def close(rule, x, normed):
        if norm == "pre":
            return rule.finish_pre_norm(x, normed, total)
        return rule.finish_post_norm(x, total, last)

    rule, plain = LayerResidual(placement), LayerResidual("none")
    rule.strength = 0.0
    torch.testing.assert_close(close(rule, x, normed), close(plain, x, normed), rtol=0, atol=0)
    rule.strength = 0.25
    torch.testing.assert_close(
        close(rule, x, normed),
        close(LayerResidual(placement), 0.25 * x, 0.25 * normed),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("kind", [EncoderLayer, DecoderLayer])
def test_after_norm_is_the_plain_layer_plus_its_input(kind, norm):
    """Equation (6) of the paper, X_{l+1} = f_l(...) + X_l, in both norm orders."""
    plain, residual = (layer(kind, v, norm, torch.float64) for v in ("none", "after_norm"))
    x, memory = inputs(torch.float64, "tgt", "memory")
    arguments = (x, memory, memory) if kind is DecoderLayer else (x,)
    torch.testing.assert_close(residual(*arguments), x + plain(*arguments), rtol=1e-12, atol=1e-12)


def test_residual_in_one_stack_only():
    arguments = (torch.randn(1, 32, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bool))
    embed, pos = torch.randn(5, 32), torch.randn(1, 32, 3, 4)
    weights = transformer().state_dict()

    def run(**changes):
        model = transformer(**changes)
        model.load_state_dict(weights)
        return model(*arguments, embed, pos)

    states, memory = run()
    for stack, memory_differs in (("encoder", True), ("decoder", False), ("both", True)):
        other, other_memory = run(layer_residual="before_norm", layer_residual_in=stack)
        assert ((other_memory - memory).abs().max() > 1e-2) == memory_differs
        assert (other - states).abs().max() > 1e-3


def test_first_decoder_layer_is_unchanged_in_post_norm():
    """Queries start at 0, so the residual of the first decoder layer adds 0 (spec of the code)."""
    weights = transformer(num_decoder_layers=1).state_dict()
    states = []
    for variant in VARIANTS:
        model = transformer(
            num_decoder_layers=1, layer_residual=variant, layer_residual_in="decoder"
        )
        model.load_state_dict(weights)
        torch.manual_seed(0)
        grid, mask = torch.randn(1, 32, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bool)
        states.append(model(grid, mask, torch.randn(5, 32), torch.randn(1, 32, 3, 4))[0])
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_initialisation_is_published():
    """Xavier matrices, zero attention biases, linear biases equal across the layers of a stack."""
    model = transformer(pre_norm=True)
    encoder = model.encoder.layers
    torch.testing.assert_close(encoder[0].linear1.bias, encoder[2].linear1.bias, rtol=0, atol=0)
    assert encoder[0].linear1.bias.abs().max() > 0
    assert (encoder[0].linear1.weight - encoder[1].linear1.weight).abs().max() > 1e-3
    matrices = {  # fan-in plus fan-out; query, key and value are one matrix of 3 x 32 rows
        "linear1.weight": 32 + 64,
        "self_attn.in_proj_weight": 32 + 3 * 32,
        "self_attn.out_proj.weight": 32 + 32,
    }
    for name, fans in matrices.items():
        largest, bound = encoder[1].get_parameter(name).abs().max(), (6 / fans) ** 0.5
        assert 0.95 * bound < largest <= bound
    for attention in (encoder[0].self_attn, model.decoder.layers[0].multihead_attn):
        assert not attention.in_proj_bias.any()
        assert not attention.out_proj.bias.any()
    assert hasattr(model.encoder.norm, "weight")
    assert transformer().encoder.norm is None


def test_padded_tokens_and_query_order_do_not_matter():
    torch.manual_seed(0)
    model = transformer(layer_residual="before_norm")
    grid, pos, embed = torch.randn(2, 32, 3, 4), torch.randn(2, 32, 3, 4), torch.randn(5, 32)
    mask = torch.zeros(2, 3, 4, dtype=torch.bool)
    mask[1, 2] = True
    mask[1, :, 3] = True
    states, _ = model(grid, mask, embed, pos)
    alone, _ = model(grid[1:, :, :2, :3], mask[1:, :2, :3], embed, pos[1:, :, :2, :3])
    torch.testing.assert_close(states[:, 1:], alone, rtol=0, atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted, _ = model(grid, mask, embed[order], pos)
    torch.testing.assert_close(permuted, states[:, :, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_residual": "after"}, "'after' is not one of none, before_norm, after_norm"),
        ({"layer_residual_in": "all"}, "'all' is not one of both, encoder, decoder"),
        ({"num_decoder_layers": 0}, "DEC_LAYERS 1 or more"),
        ({"nhead": 5}, "not divisible by MODEL.DETR.NHEADS 5"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        transformer(**changes)
