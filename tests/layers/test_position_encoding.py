import pytest
import torch

from miti_detr.layers import (
    LearnedPositionEncoding,
    SinePositionEncoding,
    build_position_encoding,
    feature_padding_mask,
)
from tests.helpers import load_golden

GOLDEN = load_golden("positions")


@pytest.mark.parametrize(("normalize", "name"), [(True, "normalized"), (False, "unnormalized")])
def test_sine_equals_published(normalize, name):
    encoding = SinePositionEncoding(16, normalize=normalize)(GOLDEN["in.mask"])
    torch.testing.assert_close(
        encoding, GOLDEN[f"sine.{name}"].float(), rtol=0, atol=2e-6, check_dtype=False
    )


def test_learned_equals_published_x_before_y():
    encoding = LearnedPositionEncoding(16)
    encoding.row_embed.weight.data = GOLDEN["learned.row_embed.weight"]
    encoding.col_embed.weight.data = GOLDEN["learned.col_embed.weight"]
    torch.testing.assert_close(
        encoding(GOLDEN["in.mask"]), GOLDEN["learned.output"], rtol=0, atol=0, check_dtype=False
    )


def test_sine_ignores_where_an_image_lies_in_a_larger_batch():
    alone = SinePositionEncoding(8)(torch.zeros(1, 4, 5, dtype=torch.bool))
    mask = torch.ones(1, 9, 7, dtype=torch.bool)
    mask[:, :4, :5] = False
    padded = SinePositionEncoding(8)(mask)[:, :, :4, :5]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-6)


def test_learned_refuses_a_grid_larger_than_its_tables():
    with pytest.raises(ValueError, match=r"50 rows and columns.*60 x 10"):
        LearnedPositionEncoding(4)(torch.zeros(1, 60, 10, dtype=torch.bool))


def test_unknown_encoding_and_odd_width():
    with pytest.raises(ValueError, match="POSITION_EMBEDDING is 'cosine'"):
        build_position_encoding("cosine", 64)
    with pytest.raises(ValueError, match="must be even"):
        build_position_encoding("sine", 33)
    with pytest.raises(ValueError, match="num_pos_feats must be even"):
        SinePositionEncoding(3)


@pytest.mark.parametrize("batch", ["pair", "odd"])
@pytest.mark.parametrize("rule", ["nearest", "ceil"])
def test_padding_mask_equals_published(batch, rule):
    sizes = [tuple(size) for size in GOLDEN[f"padding.{batch}.image_sizes"].tolist()]
    expected = GOLDEN[f"padding.{batch}.{rule}"]
    padded = (max(h for h, _ in sizes), max(w for _, w in sizes))
    mask = feature_padding_mask(sizes, padded, expected.shape[1:], stride=32, rule=rule)
    torch.testing.assert_close(mask, expected, rtol=0, atol=0)


def test_padding_mask_rules_differ_and_unknown_rule_is_named():
    """600 rows on 19 cells: floor(i 600 / 19) < 480 keeps 16, ceil(480 / 32) = 15."""
    rows = {
        rule: feature_padding_mask([(480, 32)], (600, 32), (19, 1), stride=32, rule=rule)
        for rule in ("nearest", "ceil")
    }
    assert (~rows["nearest"]).sum() == 16
    assert (~rows["ceil"]).sum() == 15
    with pytest.raises(ValueError, match="'floor' is not one of"):
        feature_padding_mask([(1, 1)], (1, 1), (1, 1), stride=1, rule="floor")
