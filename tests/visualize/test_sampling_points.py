"""Attention of a Deformable-DETR: sampling points in pixels of the image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from miti_detr.engine.predictor import Predictor
from miti_detr.layers import DeformableAttention
from miti_detr.visualize.attention import attention_maps
from miti_detr.visualize.attention_sheet import write_sheets
from miti_detr.visualize.classes import ClassTable
from tests.modeling.deformable.helpers import tiny

CLASSES = ClassTable(["circle", "square", "star"], [1, 2, 3])


@pytest.fixture(scope="module")
def predictor():
    """40 x 56 pixels become 80 x 112, padded to 96 x 128; 2 heads, 3 levels, 2 points."""
    torch.manual_seed(0)
    made = Predictor(
        tiny("base", "MODEL.DETR.SIZE_DIVISIBILITY", 32, "TEST.DETECTIONS_PER_IMAGE", 9)
    )
    for module in made.model.modules():
        if isinstance(module, DeformableAttention):
            nn.init.zeros_(module.sampling_offsets.bias)
            nn.init.normal_(module.attention_weights.weight)
    return made


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_points_are_at_the_references(predictor):
    """Without offsets: of a pixel the centre of its cell of 4 pixels, of a query its reference."""
    maps = attention_maps(predictor, noise(40, 56), num_queries=3, pixels=[(13.0, 21.0)])
    assert maps.points
    assert maps.decoder.shape == (3, 2, 2, 6, 3)
    assert maps.encoder.shape == (1, 2, 2, 6, 3)
    places = maps.encoder[0, ..., :2].reshape(-1, 2)
    expected = torch.tensor([[13.0, 21.0]]).expand_as(places)  # 6.5 and 10.5 cells of 2 pixels
    torch.testing.assert_close(places, expected, rtol=0, atol=1e-3)
    queries = predictor.model.query_embed.weight[maps.queries.query]
    reference = predictor.model.transformer.reference_points(queries.chunk(2, -1)[0]).sigmoid()
    places = reference.detach()[:, None, None, None] * torch.tensor([56.0, 40.0])
    torch.testing.assert_close(
        maps.decoder[..., :2], places.expand(-1, 2, 2, 6, -1), rtol=0, atol=1e-3
    )
    for found in (maps.decoder, maps.encoder):
        torch.testing.assert_close(found[..., 2].sum(-1), torch.ones(found.shape[:3]))


def test_each_query_is_shown_once(predictor):
    """A query may be several detections; the best one counts."""
    maps = attention_maps(predictor, noise(40, 56), num_queries=20)
    queries = maps.queries.query.tolist()
    assert len(queries) == len(set(queries)) <= 7
    assert (maps.queries.scores.diff() <= 0).all()


def test_heavy_points_are_bright(predictor, tmp_path: Path):
    image = noise(40, 56)
    maps = attention_maps(predictor, image, num_queries=1, pixels=[(13.0, 21.0)])
    files = write_sheets([("model", maps)], Image.fromarray(image), CLASSES, tmp_path, "picture")
    assert [f.name for f in files] == [
        f"picture_{stack}{number}.png" for stack in ("decoder", "encoder") for number in ("", "_1")
    ]
    sheet = np.asarray(Image.open(tmp_path / "picture_encoder.png").convert("RGB"))
    # A point of the largest weight: the brightest colour of the map, on a grey picture.
    assert (np.abs(sheet.astype(int) - [252, 255, 164]).max(-1) <= 1).any()
