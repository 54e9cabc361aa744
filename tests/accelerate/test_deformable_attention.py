"""Deformable attention by sums of rows is the plain one."""

import copy
import sys
import types

import pytest
import torch

import miti_detr.accelerate.deformable_attention as fast
from miti_detr.accelerate import accelerate, sums_of_rows
from miti_detr.layers import DeformableAttention, deformable_attention
from tests.fill import filled
from tests.helpers import load_golden, threads

SHAPES = [(5, 9), (3, 4), (1, 2)]
CELLS = sum(h * w for h, w in SHAPES)


def arguments(n, queries, heads=2, points=3, width=8, seed=0):
    """Random values; locations inside, at the border and outside of the levels."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(shape, generator=generator)

    locations = random(n, queries, heads, len(SHAPES), points, 2) * 2 - 0.5
    locations[0, 0, 0] = torch.tensor([0.0, 1.0])
    locations[0, -1] = 100.0
    weights = random(n, queries, heads, len(SHAPES) * points).softmax(-1)
    value = random(n, CELLS, heads, width) - 0.5
    return value, locations, weights.unflatten(-1, (len(SHAPES), points))


def results(function, value, locations, weights):
    """Output and gradients."""
    inputs = [x.clone().requires_grad_() for x in (value, locations, weights)]
    output = function(inputs[0], SHAPES, *inputs[1:])
    (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
    return [output.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize(
    ("n", "queries", "chunk", "count"),
    [
        pytest.param(1, 7, 2**16, 2, id="one block, two threads"),
        pytest.param(3, 40, 100, 1, id="several blocks per image"),
        pytest.param(5, 3, 120, 1, id="several images per block"),
        pytest.param(2, 1, 1, 1, id="a query per block"),
    ],
)
def test_equals_the_plain_form(n, queries, chunk, count, monkeypatch):
    monkeypatch.setattr(sums_of_rows, "_CHUNK", chunk)
    monkeypatch.setattr(sums_of_rows, "_ROWS", 16)
    given = arguments(n, queries)
    with threads(count):
        found = results(fast.sample_rows, *given)
    for ours, plain in zip(found, results(deformable_attention, *given), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-5)


def module():
    golden = load_golden("deformable")
    made = DeformableAttention(32, 4, num_levels=2, num_points=3)
    made.load_state_dict(filled(made.state_dict(), "core."))
    query, tokens, ref, mask = (
        golden[f"module.in.{name}"] for name in ("query", "input", "ref2", "mask")
    )
    shapes = [tuple(shape) for shape in golden["core.shapes"].tolist()]
    return made, (query, ref, tokens, shapes, mask), golden["module.out_ref2"]


def test_module_equals_published():
    made, given, expected = module()
    accelerate(made)
    assert type(made) is fast.FastDeformableAttention
    torch.testing.assert_close(made(*given), expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(made)(*given), made(*given), rtol=0, atol=0)


def test_other_precisions():
    """float64 by the plain form; bfloat16 by autocast near float32."""
    made, given, expected = module()
    accelerate(made)
    double = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given
    ]
    torch.testing.assert_close(copy.deepcopy(made).double()(*double), expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = made(*given)
        low.float().sum().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected.float(), rtol=0, atol=0.05)
    assert made.sampling_offsets.weight.grad.abs().max() > 0


def test_locations_that_are_no_numbers():
    """No index out of bounds; other queries stay as they are."""
    value, locations, weights = arguments(2, 5)
    expected = fast.sample_rows(value, SHAPES, locations, weights)
    for bad in (torch.nan, torch.inf, -torch.inf, 1e30):
        broken = locations.clone()
        broken[1, 2] = bad
        found = results(fast.sample_rows, value, broken, weights)[0]
        others = [0, 1, 3, 4]
        torch.testing.assert_close(found[1, others], expected[1, others], rtol=0, atol=1e-6)


def test_tracing_sees_public_operators():
    made, given, expected = module()
    accelerate(made).requires_grad_(False)
    query, ref, tokens, shapes, mask = given
    traced = torch.jit.trace(lambda q, r, t: made(q, r, t, shapes, mask), (query, ref, tokens))
    assert "grid_sampler" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(query, ref, tokens), expected.float(), rtol=0, atol=1e-5)


def test_without_sparse_products_the_plain_form_is_used(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.sparse, "sampled_addmm", fail)
    fast._works.cache_clear()
    made, given, expected = module()
    accelerate(made)
    try:
        with caplog.at_level("INFO", logger=fast.logger.name):
            fast.logger.propagate = True
            torch.testing.assert_close(made(*given), expected.float(), rtol=0, atol=1e-5)
        assert not fast._works()
    finally:
        fast._works.cache_clear()


def test_arguments_of_deformops(monkeypatch):
    """As its documentation has them: sizes and first cells of the levels, weights like values."""
    value, locations, weights = arguments(2, 5)

    def msda(given, sizes, starts, places, factors):
        assert starts.tolist() == [0, 45, 57]
        assert factors.dtype == given.dtype
        return deformable_attention(given, [tuple(s) for s in sizes.tolist()], places, factors)

    registry = types.SimpleNamespace(msda=msda)
    monkeypatch.setitem(sys.modules, "deformops", types.SimpleNamespace(registry=registry))
    monkeypatch.setitem(sys.modules, "deformops.registry", registry)
    fast._deformops.cache_clear()
    try:
        found = fast._deformops()(value.bfloat16(), SHAPES, locations, weights)
    finally:
        fast._deformops.cache_clear()
    expected = deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
