"""When a module is recorded, replayed, and run as it is, with a recorder that needs no GPU."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from miti_detr.accelerate import accelerate, cuda_graphs, use_cuda_graphs


class FakeGraph:
    """Counts its calls and returns what it was recorded with, doubled."""

    made: "list[FakeGraph]" = []

    def __init__(self, module, function, args, pool) -> None:
        self.function, self.calls, self.pending = function, 0, False
        if len(args[0]) == 13:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        FakeGraph.made.append(self)

    def is_pending(self) -> bool:
        return self.pending

    def __call__(self, tensors):
        self.calls += 1
        return 2 * self.function(*tensors)


@pytest.fixture
def graphed(monkeypatch):
    monkeypatch.setattr(FakeGraph, "made", [])
    module = nn.Linear(3, 2)
    use_cuda_graphs(module, FakeGraph)
    return module


def is_replayed(module, x) -> bool:
    plain = nn.functional.linear(x, module.weight, module.bias)
    found = module(x)
    return torch.equal(found, 2 * plain) or not torch.equal(found, plain)


def test_the_second_appearance_of_a_shape_is_recorded(graphed):
    assert [is_replayed(graphed, torch.ones(n, 3)) for n in (1, 1, 1, 2, 2)] == [
        *(False, True, True),
        *(False, True),
    ]
    assert [graph.calls for graph in FakeGraph.made] == [2, 1]
    assert list(graphed.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.eval(),
        lambda m: m.weight.requires_grad_(False),
        lambda m: setattr(m.weight, "data", m.weight.data.clone()),
        lambda m: m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True),
        lambda m: m.double(),
    ],
    ids=["mode", "frozen", "data", "assigned", "precision"],
)
def test_what_a_recording_depends_on(graphed, change):
    x = torch.ones(1, 3)
    graphed(x), graphed(x)
    change(graphed)
    assert not is_replayed(graphed, x.to(graphed.weight.dtype))


def test_gradients_and_autocast_have_recordings_of_their_own(graphed):
    x = torch.ones(1, 3)
    graphed(x), graphed(x)
    with torch.no_grad():
        assert not is_replayed(graphed, x)
    with torch.autocast("cpu", torch.bfloat16):
        graphed(x)
    assert len(FakeGraph.made) == 1


def test_weights_that_change_in_place_need_no_new_recording(graphed):
    x = torch.ones(1, 3)
    graphed(x), graphed(x)
    with torch.no_grad():
        graphed.weight.add_(1)
    assert is_replayed(graphed, x)
    assert len(FakeGraph.made) == 1


def test_a_pending_backward_pass_is_not_overwritten(graphed):
    for n in (1, 1, 2, 2):
        graphed(torch.ones(n, 3))
    FakeGraph.made[0].pending = True
    assert not is_replayed(graphed, torch.ones(1, 3))
    assert not is_replayed(graphed, torch.ones(2, 3))
    FakeGraph.made[0].pending = False
    assert is_replayed(graphed, torch.ones(2, 3))


def test_hooks_of_parts_are_called():
    net = nn.Sequential(nn.Linear(3, 2))
    use_cuda_graphs(net, FakeGraph)
    x, seen = torch.ones(1, 3), []
    net(x), net(x)
    net[0].register_forward_hook(lambda *_: seen.append(1))
    net(x)
    assert seen == [1]


def test_the_least_recently_used_recording_is_dropped(graphed, caplog):
    for n in range(1, cuda_graphs.MOST_SHAPES + 2):
        graphed(torch.ones(n, 3)), graphed(torch.ones(n, 3))
    assert "Raise MODEL.DETR.SIZE_DIVISIBILITY" in caplog.text
    assert is_replayed(graphed, torch.ones(cuda_graphs.MOST_SHAPES, 3))
    count = len(FakeGraph.made)
    graphed(torch.ones(1, 3))  # dropped; its shape is known, so that it is recorded again
    assert len(FakeGraph.made) == count + 1


def test_a_module_that_cannot_be_recorded_runs_as_it_is(graphed, caplog):
    x = torch.ones(13, 3)
    assert not any(is_replayed(graphed, x) for _ in range(3))
    assert caplog.text.count("runs without a graph: operation not permitted") == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_record_anew(copied):
    made = cuda_graphs.GraphCache()
    made._recordings[1] = None
    assert not copied(made)._recordings


class Traced:
    """Replays the operations of a call on the tensors that it used, as a CUDA graph does."""

    def __init__(self, module, function, args, pool) -> None:
        self.graph = make_fx(lambda *given: function(*given))(*args)

    def is_pending(self) -> bool:
        return False

    def __call__(self, tensors):
        return self.graph(*tensors)


def test_weights_are_prepared_within_the_recording():
    """The part whose weights are prepared is the recorded module itself, as in small models."""
    plain = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    ours, eager = accelerate(copy.deepcopy(plain)), accelerate(copy.deepcopy(plain))
    use_cuda_graphs(ours[0], Traced)
    x = torch.ones(2, 8)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(x), eager(x), rtol=0, atol=0)
        with torch.no_grad():
            for parameter in (*ours.parameters(), *eager.parameters()):
                parameter.mul_(1.5)
    (recording,) = ours[0]._graphs._recordings.values()
    assert recording is not None
