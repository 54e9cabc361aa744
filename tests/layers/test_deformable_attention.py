"""Deformable attention against the published module and analytic cases."""

import pytest
import torch

from miti_detr.layers import DeformableAttention, deformable_attention
from tests.fill import filled
from tests.helpers import load_golden

GOLDEN = load_golden("deformable")
SHAPES = [tuple(shape) for shape in GOLDEN["core.shapes"].tolist()]


def core(dtype=torch.float64):
    value, locations, weights = (
        GOLDEN[f"core.in.{name}"].to(dtype) for name in ("value", "locations", "weights")
    )
    return value, SHAPES, locations, weights


def module():
    made = DeformableAttention(32, 4, num_levels=2, num_points=3)
    made.load_state_dict(filled(made.state_dict(), "core."))
    return made.double()


def test_core_equals_published():
    torch.testing.assert_close(
        deformable_attention(*core()), GOLDEN["core.out"], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("references", ["ref2", "ref4"])
def test_module_equals_published(references):
    """References are float32 in the published code."""
    query, tokens, ref = (
        GOLDEN[f"module.in.{name}"].double() for name in ("query", "input", references)
    )
    result = module()(query, ref, tokens, SHAPES, GOLDEN["module.in.mask"])
    expected = GOLDEN[f"module.out_{references}"]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_points_start_on_rays():
    made = DeformableAttention(32, 4, num_levels=2, num_points=3)
    expected = GOLDEN["module.offset_bias_at_init"]
    torch.testing.assert_close(made.sampling_offsets.bias, expected, rtol=0, atol=1e-6)
    query = torch.randn(1, 5, 32)
    _, weights = made.sampling_points(query, torch.rand(1, 5, 2, 2), SHAPES)
    torch.testing.assert_close(weights, torch.full((1, 5, 4, 2, 3), 1 / 6), rtol=0, atol=1e-7)


def test_a_linear_feature_is_read_at_its_location():
    """For value = (x, y) of the cell centres, bilinear samples inside are the location itself."""
    h, w = 8, 10
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    value = torch.stack([x, y], -1).double().view(1, h * w, 1, 2)
    locations = torch.rand(1, 6, 1, 1, 1, 2, dtype=torch.float64) * 0.8 + 0.1
    weights = torch.ones(1, 6, 1, 1, 1, dtype=torch.float64)
    result = deformable_attention(value, [(h, w)], locations, weights)
    torch.testing.assert_close(result, locations.view(1, 6, 2), rtol=0, atol=1e-7)


def test_gradients_away_from_the_knots():
    """Analytic against numeric gradients, each point a quarter of a cell from any cell centre."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (2, 2)]
    value = torch.randn(1, 16, 2, 3, dtype=torch.float64, generator=generator)
    cells = torch.randint(0, 2, (1, 4, 2, 2, 2, 2), generator=generator)
    sizes = torch.tensor([[4.0, 3.0], [2.0, 2.0]], dtype=torch.float64)
    locations = (cells + 0.75) / sizes[:, None]
    weights = torch.rand(1, 4, 2, 2, 2, dtype=torch.float64, generator=generator)
    inputs = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, p, a: deformable_attention(v, shapes, p, a), inputs)


def test_bfloat16_values_are_read_at_float32_locations():
    """A location that bfloat16 would round to the next cell is read where it is."""
    w = 400
    value = torch.arange(w, dtype=torch.float32).view(1, w, 1, 1)
    locations = torch.tensor([300.5, 301.5, 302.5]).view(1, 3, 1, 1, 1, 1) / w
    locations = torch.cat([locations, torch.full_like(locations, 0.5)], -1)
    weights = torch.ones(1, 3, 1, 1, 1, dtype=torch.bfloat16)
    result = deformable_attention((value / 512).bfloat16(), [(1, w)], locations, weights)
    assert result.dtype == torch.bfloat16
    expected = (value[0, 300:303, 0] / 512).bfloat16()
    torch.testing.assert_close(result[0], expected, rtol=0, atol=0)


def test_wrong_arguments_are_named():
    value, _, locations, weights = core()
    with pytest.raises(ValueError, match="do not have the 30 cells of value"):
        deformable_attention(value, [(6, 4), (3, 3)], locations, weights)
    with pytest.raises(ValueError, match=r"HIDDEN_DIM 30 is not divisible by MODEL.DETR.NHEADS 4"):
        DeformableAttention(30, 4, num_levels=1, num_points=1)
