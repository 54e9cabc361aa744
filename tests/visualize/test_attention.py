"""Attention maps show the attention of the model at the right cells."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from miti_detr.engine.predictor import Predictor
from miti_detr.modeling.transformer import DecoderLayer, EncoderLayer
from miti_detr.visualize.attention import attention_maps, recorded_attention
from miti_detr.visualize.attention_sheet import heat_picture, write_sheets
from miti_detr.visualize.classes import ClassTable
from tests.helpers import tiny_config

CLASSES = ClassTable(["circle", "square", "star"], [1, 2, 3])


@pytest.fixture(scope="module")
def predictor():
    """40 x 56 pixels become 80 x 112, padded to 96 x 128, with stride 8."""
    torch.manual_seed(0)
    predictor = Predictor(
        tiny_config("MODEL.DETR.SIZE_DIVISIBILITY", 32, "MODEL.DETR.DEC_LAYERS", 2)
    )
    for parameter in predictor.model.transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return predictor


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_maps_of_a_detector(predictor):
    """Shapes are layers, heads and un-padded cells; maps sum to 1; queries match the results."""
    image = noise(40, 56)
    maps = attention_maps(predictor, image, num_queries=3)
    assert maps.decoder.shape == (3, 2, 2, 10, 14)
    assert maps.encoder.shape == (3, 2, 2, 10, 14)
    assert maps.extent == (10, 14)
    for weights in (maps.decoder, maps.encoder):
        torch.testing.assert_close(
            weights.sum(dim=(-2, -1)), torch.ones(3, 2, 2), rtol=0, atol=1e-5
        )
    expected = predictor([image])[0]
    best = expected.scores.argsort(descending=True)[:3]
    torch.testing.assert_close(maps.queries.scores, expected.scores[best], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        maps.queries.pred_boxes.tensor, expected.pred_boxes.tensor[best], rtol=1e-4, atol=1e-2
    )


def test_maps_are_where_the_tokens_are(predictor, monkeypatch):
    """Attention to a single cell appears there: token 3 * 16 + 5 of a grid with 16 columns."""
    weights = torch.zeros(1, 2, 7, 12 * 16)
    weights[..., 3 * 16 + 5] = 1

    def at_one_cell(self, query, key, mask=None):
        return weights[:, :, : query.shape[1]]

    monkeypatch.setattr("miti_detr.layers.MultiHeadAttention.weights", at_one_cell)
    maps = attention_maps(predictor, noise(40, 56), num_queries=1)
    assert maps.decoder[0, 0, 0].nonzero().tolist() == [[3, 5]]
    picture = heat_picture(maps.decoder[0, 0, 0], maps.extent, (56, 40))
    brightest = np.unravel_index(picture.argmax(), picture.shape)
    assert 3 * 4 <= brightest[0] < 4 * 4  # a cell is 4 pixels wide
    assert 5 * 4 <= brightest[1] < 6 * 4


def test_pixels_choose_cells(predictor):
    """The encoder's map of a pixel is the row of its cell in the whole attention matrix."""
    image = noise(40, 56)
    maps = attention_maps(predictor, image, num_queries=1, pixels=[(0, 0), (23, 13)])
    model = predictor.model
    with torch.no_grad(), recorded_attention(model, EncoderLayer, "self_attn") as whole:
        model([predictor.prepare(image)])
    assert len(whole) == 2
    for index, token in enumerate((0, (13 // 4) * 16 + 23 // 4)):
        expected = whole[1][:, token].unflatten(-1, (12, 16))[:, :10, :14]
        torch.testing.assert_close(maps.encoder[index, 1], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="pixel 56,3 is outside the image of 56 x 40"):
        attention_maps(predictor, image, pixels=[(56, 3)])


def test_nothing_is_kept_unless_asked(predictor):
    modules = list(predictor.model.modules())
    before = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules]
    with recorded_attention(predictor.model, DecoderLayer, "multihead_attn"):
        assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules] != before
    assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules] == before


def test_cells_beyond_the_image_are_cut_off():
    """A picture 1.5 cells wide shows half of the second cell."""
    weights = torch.tensor([[0.0, 1.0]])
    picture = heat_picture(weights, (1.0, 1.5), (30, 20))
    assert picture.shape == (20, 30)
    assert picture[0, 0] == 0
    assert picture[0, 29] == pytest.approx(1, abs=0.05)
    assert picture[0, 19] == pytest.approx(0.5, abs=0.05)  # the border of the cells is at 20


@pytest.mark.slow
def test_sheets(predictor, tmp_path: Path):
    """There is an overview and a sheet per query and pixel, with both models."""
    image = noise(40, 56)
    maps = attention_maps(predictor, image, num_queries=2)
    picture = Image.fromarray(image)
    one = write_sheets([("detr", maps)], picture, CLASSES, tmp_path / "one", "photo")
    two = write_sheets([("detr", maps), ("miti", maps)], picture, CLASSES, tmp_path, "photo")
    assert [path.name for path in two] == [
        *("photo_decoder.png", "photo_decoder_1.png", "photo_decoder_2.png"),
        *("photo_encoder.png", "photo_encoder_1.png", "photo_encoder_2.png"),
    ]
    for left, both in zip(one, two, strict=True):
        with Image.open(left) as a, Image.open(both) as b:
            assert b.height == a.height
            colours = [(np.ptp(np.asarray(sheet), axis=2) > 10).sum() for sheet in (a, b)]
            assert 1.9 < colours[1] / colours[0] < 2.1


def test_another_model_is_refused(predictor):
    other = Predictor(model=nn.Linear(1, 1), resize=predictor.resize, input_format="RGB")
    with pytest.raises(ValueError, match="need a MitiDetr, not a Linear"):
        attention_maps(other, noise(8, 8))
