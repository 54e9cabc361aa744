"""The plain path computes what the package computes."""

from typing import Any

import pytest
import torch

from benchmarks.loop_criterion import LoopCriterion
from benchmarks.peers import Peer, set_dropout
from benchmarks.spec import make_weights
from miti_detr.bench.meters import Clock
from miti_detr.layers import MultiHeadAttention
from miti_detr.modeling import HungarianMatcher, SetCriterion
from tests.benchmarks.helpers import PADDED, small_spec

WEIGHTS = {"class_weight": 2.0, "l1_weight": 4.0, "giou_weight": 3.0}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Peer, Peer]:
    """Ours and plain on a padded batch, without dropout."""
    spec = small_spec("MODEL.DETR.DROPOUT", 0.0, sizes=PADDED)
    path = str(tmp_path_factory.mktemp("weights") / "model.pth")
    assert make_weights(spec, path) == "random weights"
    return Peer(spec, "ours", path), Peer(spec, "plain", path)


@pytest.mark.slow
def test_the_plain_peer_is_plain(peers: tuple[Peer, Peer]) -> None:
    """Otherwise equal results mean nothing: it has neither our acceleration nor our set loss."""
    ours, plain = (peer.model for peer in peers)
    assert any(ours.acceleration.counts.values())
    assert not hasattr(plain, "acceleration")
    assert isinstance(ours.criterion, SetCriterion)
    assert isinstance(plain.criterion, LoopCriterion)
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_inference_agrees(peers: tuple[Peer, Peer]) -> None:
    for peer in peers:
        peer.model.eval()
    (logits, boxes), (plain_logits, plain_boxes) = (peer.outputs() for peer in peers)
    assert logits.shape == (2, 7, 6)
    assert logits.std() > 0.1  # not a constant
    torch.testing.assert_close(logits, plain_logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(boxes, plain_boxes, rtol=0, atol=1e-5)


def test_precision_is_that_of_the_work(peers: tuple[Peer, Peer]) -> None:
    """In bfloat16 outputs differ by more than float32 can, and by no more than it should."""
    ours = peers[0]
    ours.model.eval()
    exact, _ = ours.outputs()
    ours.precision = "bfloat16"
    rounded, _ = ours.outputs()
    ours.precision = "float32"
    assert 1e-3 < (exact - rounded).abs().max() < 0.3


@pytest.mark.slow
def test_training_agrees(peers: tuple[Peer, Peer]) -> None:
    """Loss, the gradient of every parameter, and the weights after the step of the optimizer."""
    ours, plain = peers
    for peer in peers:
        peer.model.train()
    losses = [peer.loss(Clock(peer.device)) for peer in peers]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    other = dict(plain.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        assert (parameter.grad is None) == (other[name].grad is None), name
        if parameter.grad is not None:
            scale = other[name].grad.abs().max().item()
            torch.testing.assert_close(
                parameter.grad, other[name].grad, rtol=0, atol=1e-3 * scale + 1e-7
            )
    for peer in peers:
        peer.update()
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, other[name], rtol=0, atol=3e-4)


@pytest.mark.slow
def test_the_clock_of_a_step_has_every_part(peers: tuple[Peer, Peer]) -> None:
    for peer in peers:
        clock = Clock(peer.device)
        peer.model.train()
        peer.train_step(clock)
        assert list(clock.parts) == ["forward", "criterion", "backward", "optimizer"]
        assert min(clock.parts.values()) > 0


def criteria(**changes: Any) -> tuple[SetCriterion, LoopCriterion]:
    shared: dict[str, Any] = {"num_classes": 5, **WEIGHTS, "no_object_weight": 0.3, **changes}
    return SetCriterion(matcher=HungarianMatcher(**WEIGHTS), **shared), LoopCriterion(**shared)


def predictions(
    counts: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
    """3 layers, 7 queries, 5 classes; images with the given numbers of objects."""
    generator = torch.Generator().manual_seed(sum(counts))

    def boxes(*size: int) -> torch.Tensor:
        return 0.1 + 0.4 * torch.rand(*size, 4, generator=generator)

    logits = torch.randn(3, len(counts), 7, 6, generator=generator).requires_grad_()
    labels = [torch.randint(0, 5, (count,), generator=generator) for count in counts]
    targets = [{"labels": x, "boxes": boxes(len(x))} for x in labels]
    return logits, boxes(3, len(counts), 7).requires_grad_(), targets


@pytest.mark.parametrize("counts", [(2, 0, 5), (0, 0), (9, 1)])  # 9 objects for 7 queries
@pytest.mark.parametrize("deep", [True, False])
def test_losses_one_by_one_equal_ours(counts: tuple[int, ...], deep: bool) -> None:
    results = []
    for criterion in criteria(deep_supervision=deep):
        logits, boxes, targets = predictions(counts)
        losses = criterion(logits, boxes, targets)
        torch.stack(list(losses.values())).sum().backward()
        results.append((losses, logits.grad, boxes.grad))
    assert len(results[0][0]) == (9 if deep else 3)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_dropout_is_set_in_every_form() -> None:
    model = torch.nn.ModuleList(
        [
            torch.nn.Dropout(0.1),
            MultiHeadAttention(8, 2, dropout=0.1),
            torch.nn.MultiheadAttention(8, 2, dropout=0.1),
        ]
    )
    set_dropout(model, 0.0)
    assert model[0].p == model[1].dropout == model[2].dropout == 0.0
