"""timm's frozen batch norms in one operation equal timm's own."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from miti_detr.accelerate import accelerate

timm_layers = pytest.importorskip("timm.layers")


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    norms = [timm_layers.BatchNormAct2d(8, act_layer=act) for act in (nn.ReLU6, nn.Identity)]
    for norm in norms:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[0], nn.Conv2d(8, 8, 1), norms[1])
    frozen: nn.Module = timm_layers.freeze_batch_norm_2d(model)
    return frozen


def _run(model: nn.Module) -> tuple[Tensor, ...]:
    x = torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8).requires_grad_()
    y = model(x)
    return y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])


def test_results_and_gradients_are_timms(plain: nn.Module) -> None:
    faster = accelerate(copy.deepcopy(plain))
    assert "2 frozen batch norms of timm" in str(faster.acceleration)
    torch.testing.assert_close(_run(faster), _run(plain), rtol=1e-4, atol=1e-4)


def test_results_in_float64(plain: nn.Module) -> None:
    x = torch.rand(1, 3, 9, 7, dtype=torch.float64)
    expected = copy.deepcopy(plain).double()(x)
    faster = accelerate(copy.deepcopy(plain)).double()
    torch.testing.assert_close(faster(x), expected, rtol=1e-12, atol=1e-12)


def test_copies_and_changed_statistics(plain: nn.Module) -> None:
    faster = accelerate(copy.deepcopy(plain))
    for copied in (copy.deepcopy(faster), pickle.loads(pickle.dumps(faster))):
        assert type(copied[1]) is type(faster[1])
        assert list(copied.state_dict()) == list(plain.state_dict())
        changed = copy.deepcopy(plain)
        for model in (copied, changed):
            model[1].running_mean.mul_(2)
        torch.testing.assert_close(_run(copied), _run(changed), rtol=1e-4, atol=1e-4)


def test_other_precisions_and_traces_are_as_before(plain: nn.Module) -> None:
    faster = accelerate(copy.deepcopy(plain))
    x = torch.rand(1, 3, 9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = plain(x), faster(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)
    traced = torch.jit.trace(faster.eval(), x)
    assert "aten::batch_norm" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain.eval()(x))
