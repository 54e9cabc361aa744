"""Hugging Face's DETR does the same work on the same weights."""

import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")

from benchmarks.huggingface import HuggingFacePeer
from benchmarks.peers import Peer, set_dropout
from benchmarks.spec import Weights, bench_config, make_weights
from miti_detr.bench.meters import Clock
from tests.benchmarks.helpers import DETR, PADDED, small_spec

SPEC = small_spec(*DETR, sizes=PADDED)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    folder = tmp_path_factory.mktemp("weights")
    path, hf_folder = str(folder / "model.pth"), str(folder / "hf")
    return Weights(path, hf_folder, make_weights(SPEC, path, hf_folder))


@pytest.fixture
def peers(weights: Weights) -> tuple[Peer, HuggingFacePeer]:
    made = Peer(SPEC, "ours", weights.path), HuggingFacePeer(SPEC, weights.hf_folder)
    for peer in made:
        set_dropout(peer.model, 0.0)
    return made


@pytest.mark.slow
def test_inference_agrees(peers: tuple[Peer, HuggingFacePeer]) -> None:
    for peer in peers:
        peer.model.eval()
    (logits, boxes), (other_logits, other_boxes) = (peer.outputs() for peer in peers)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, other_logits, rtol=0, atol=5e-5)
    torch.testing.assert_close(boxes, other_boxes, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_first_training_steps_agree(peers: tuple[Peer, HuggingFacePeer]) -> None:
    """Losses of two decoder layers, gradients, clipping and two learning rates, three times."""
    losses = []
    for peer in peers:
        peer.model.train()
        losses.append([peer.train_step(Clock(peer.device)) for _ in range(3)])
    assert losses[0][0] != pytest.approx(losses[0][2], rel=1e-4)  # it learns
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.slow
def test_all_its_parts_are_timed(peers: tuple[Peer, HuggingFacePeer]) -> None:
    clock = Clock(peers[1].device)
    peers[1].model.train()
    peers[1].train_step(clock)
    assert list(clock.parts) == ["forward", "criterion", "backward", "optimizer"]


def test_the_decoder_is_the_same_with_auxiliary_losses(weights: Weights) -> None:
    """The states of a repaired decoder are those of the same layers without auxiliary losses."""
    peer = HuggingFacePeer(SPEC, weights.hf_folder)
    model = peer.model.eval()
    assert model.config.auxiliary_loss
    with torch.no_grad():
        repaired = model(**peer._batch, labels=peer._labels)
        assert model.config.auxiliary_loss  # put back
        model.config.auxiliary_loss = False
        plain = model.model(**peer._batch)
    torch.testing.assert_close(
        repaired.last_hidden_state, plain.last_hidden_state, rtol=0, atol=1e-6
    )
    assert len(repaired.auxiliary_outputs) == 1  # of the layer before the last


def test_another_choice_of_layers_is_named(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze_nothing(peer: HuggingFacePeer) -> None:
        peer.model.requires_grad_(True)

    monkeypatch.setattr(HuggingFacePeer, "_freeze", freeze_nothing)
    with pytest.raises(ValueError, match=r"Hugging Face trains 1\d,.* parameters, the config 1\d"):
        HuggingFacePeer(SPEC, weights.hf_folder)


@pytest.mark.slow
@pytest.mark.parametrize("freeze_at", [0, 1, 3])
def test_the_same_layers_are_trained(weights: Weights, freeze_at: int) -> None:
    """Building it compares the numbers of trainable parameters."""
    spec = small_spec(*DETR, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    frozen = [
        name
        for name, p in HuggingFacePeer(spec, weights.hf_folder).model.named_parameters()
        if not p.requires_grad
    ]
    assert any("conv1" in name for name in frozen) == (freeze_at > 0)
    assert any("layer2" in name for name in frozen) == (freeze_at > 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.DETR.LAYER_RESIDUAL", "before_norm"), "Add MODEL.DETR.LAYER_RESIDUAL none"),
        (("MODEL.DETR.PRE_NORM", True), "MODEL.DETR.PRE_NORM False"),
        (("MODEL.DETR.PADDING_MASK", "ceil"), "Add MODEL.DETR.PADDING_MASK nearest"),
    ],
)
def test_what_it_cannot_be_is_named(overrides: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_config(small_spec(*DETR, *overrides, sizes=PADDED), "hf")


def test_weights_of_losses_that_it_cannot_have_are_named(weights: Weights) -> None:
    spec = small_spec(*DETR, "MODEL.DETR.L1_WEIGHT", 2.5)
    with pytest.raises(ValueError, match="integers as L1_WEIGHT"):
        HuggingFacePeer(spec, weights.hf_folder)


def test_without_transformers_the_extra_is_named(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install miti_detr\[hf,timm\]"):
        HuggingFacePeer(SPEC, weights.hf_folder)
