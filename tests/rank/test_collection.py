"""Token matrices are those between the layers, without padding; the model does not change."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from miti_detr.accelerate.prepared_weights import is_hooked
from miti_detr.rank import measure_rank, measure_tokens, record_states
from tests.helpers import tiny_config, training_input


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(tiny_config("MODEL.DETR.DROPOUT", 0.2))


def inputs(*sizes):
    images = [training_input(size, [], [], seed) for seed, size in enumerate(sizes)]
    return [{"image": image["image"]} for image in images]


def test_states_of_a_detector(model):
    """Layer 0 of the encoder is the projected feature, the last one is the memory, and normalised
    states are the input of the heads."""
    model.eval()
    images = model.preprocess_image(inputs((64, 96)))
    with torch.no_grad(), record_states(model) as stacks:
        encoded = model.encode(images)
        source = encoded.source
        states, memory = model.transformer(
            source, encoded.mask, model.query_embed.weight, encoded.position
        )
    encoder, decoder = stacks["encoder"], stacks["decoder"]
    assert (len(encoder.states), len(decoder.states)) == (3, 3)
    torch.testing.assert_close(encoder.states[0], source.flatten(2).transpose(1, 2))
    torch.testing.assert_close(encoder.states[-1], memory.flatten(2).transpose(1, 2))
    torch.testing.assert_close(decoder.norm(torch.stack(decoder.states[1:])), states)


def test_padding_is_left_out(model):
    """An image has the same measures on its own and in a padded batch, including entropies."""
    torch.manual_seed(0)
    source, query = torch.randn(2, 32, 6, 7), model.query_embed.weight
    mask = torch.zeros(2, 6, 7, dtype=torch.bool)
    mask[0, 4:], mask[0, :, 5:] = True, True
    small = (source[:1, :, :4, :5], mask[:1, :4, :5])
    position = model.position_encoding
    single = measure_rank(model.transformer, *small, query, position(small[1]))
    both = measure_rank(model.transformer, source, mask, query, position(mask))
    assert list(single) == ["encoder", "decoder", "decoder, normalised"]
    for stack, layers in single.items():
        for layer, batch in zip(layers, both[stack], strict=True):
            assert set(layer) == set(batch)
            for key, values in layer.items():
                assert batch[key][0] == pytest.approx(values[0], rel=1e-3, nan_ok=True), key
    assert "entropy_self" in single["encoder"][1]
    assert "entropy_cross" in single["decoder"][1]


def test_model_is_left_as_it_was(model):
    """Training flags, weights, gradient mode and hooks are restored; dropout is off meanwhile."""
    model.train()
    model.backbone.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first, second = (measure_rank(model, inputs((64, 96))) for _ in range(2))
    assert str(first) == str(second)
    assert model.training
    assert not model.backbone.training
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(is_hooked(m) for m in model.transformer.modules())


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_torch(batch_first):
    """For a torch encoder with padding, only un-padded tokens are measured."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first).eval()
    x = torch.randn(2, 7, 16) if batch_first else torch.randn(7, 2, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    found = measure_rank(encoder, x, src_key_padding_mask=padding)["layers"]
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=padding)
    y = y if batch_first else y.transpose(0, 1)
    for image, length in enumerate((7, 4)):
        expected = measure_tokens(y[image, :length])
        for key, value in expected.items():
            assert found[3][key][image] == pytest.approx(value, rel=1e-4), key


@pytest.mark.slow
def test_compiled_models_are_measured():
    """Compiled code ignores hooks that are added later."""
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(1, 7, 16)
    plain = measure_rank(layer, x)
    layer.compile(backend="eager")
    with torch.no_grad():
        layer(x)
    assert str(measure_rank(layer, x)) == str(plain)


def test_a_model_without_transformer_is_refused():
    with pytest.raises(ValueError, match="Linear ran no transformer layer"):
        measure_rank(nn.Linear(3, 3), torch.zeros(1, 3))
