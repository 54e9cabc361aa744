"""Rank of the tokens of all levels, of which a sample is measured."""

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.rank import collection, measure_rank, measure_tokens, record_states
from tests.helpers import training_input
from tests.modeling.deformable.helpers import tiny


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny("two_stage")).eval()


def inputs(*sizes):
    images = [training_input(size, [], [], seed) for seed, size in enumerate(sizes)]
    return [{"image": image["image"]} for image in images]


def test_states_of_all_levels(model):
    with torch.no_grad(), record_states(model) as stacks:
        encoded = model.encode(model.preprocess_image(inputs((64, 96), (64, 64))))
        decoded = model.decode(encoded, model.embed_queries([]))
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    torch.testing.assert_close(encoder.states[0], encoded.source)
    torch.testing.assert_close(encoder.states[-1], decoded.memory)
    torch.testing.assert_close(encoder.keep, ~encoded.mask)
    torch.testing.assert_close(torch.stack(decoder.states[1:]), decoded.states)


def test_measures_have_entropies_over_points(model):
    """Uniform weights, as at the start: entropy 1."""
    found = measure_rank(model, inputs((64, 96)))
    assert list(found) == ["encoder", "decoder"]
    assert found["encoder"][1]["entropy_self"] == [pytest.approx(1)]
    assert found["decoder"][1]["entropy_cross"] == [pytest.approx(1)]
    assert 0 < found["decoder"][1]["entropy_self"][0] <= 1


def test_a_sample_of_tokens_is_measured(model, monkeypatch):
    """Evenly spread, first and last included."""
    with torch.no_grad(), record_states(model) as stacks:
        model(inputs((64, 96)))
    state = stacks["encoder"].states[-1][0]
    whole = stacks["encoder"].measure()[-1]["residual"][0]
    assert whole == pytest.approx(measure_tokens(state)["residual"])
    monkeypatch.setattr(collection, "MOST_TOKENS", 3)
    expected = measure_tokens(state[[0, round((len(state) - 1) / 2), len(state) - 1]])
    assert stacks["encoder"].measure()[-1]["residual"] == [pytest.approx(expected["residual"])]
