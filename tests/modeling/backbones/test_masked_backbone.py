import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_resnet_backbone
from detectron2.structures import ImageList

from miti_detr.modeling import MaskedBackbone, build_detr_resnet_backbone
from tests.helpers import tiny_config

RGB = ShapeSpec(channels=3)


def resnet_config(depth, *overrides):
    """The standard widths of a ResNet; ``overrides`` are KEY, VALUE, ..."""
    width = 64 if depth < 50 else 256
    return tiny_config(
        *("MODEL.RESNETS.DEPTH", depth),
        *("MODEL.RESNETS.NORM", "FrozenBN"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 64),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", width),
        *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
        *overrides,
    )


class TwoOutputs(Backbone):
    def output_shape(self):
        return {"a": ShapeSpec(channels=4, stride=8), "b": ShapeSpec(channels=6, stride=16)}

    def forward(self, x):
        n, _, h, w = x.shape
        return {"a": x.new_zeros(n, 4, h // 8, w // 8), "b": x.new_ones(n, 6, h // 16, w // 16)}


@pytest.mark.slow
@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_equals_detectron2(depth):
    """Without dilation the two builders make the same network, with the same keys."""
    cfg = resnet_config(depth)
    torch.manual_seed(0)
    ours, theirs = build_detr_resnet_backbone(cfg, RGB), build_resnet_backbone(cfg, RGB)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 96)
    for name, feature in theirs.eval()(x).items():
        torch.testing.assert_close(ours.eval()(x)[name], feature, rtol=0, atol=0)


def test_dc5_has_published_dilations():
    """(1, 2, 2), not Detectron2's (2, 2, 2); the feature has stride 16."""
    cfg = resnet_config(50, "MODEL.RESNETS.RES5_DILATION", 2)
    backbone = build_detr_resnet_backbone(cfg, RGB)
    assert [block.conv2.dilation[0] for block in backbone.res5] == [1, 2, 2]
    assert [block.conv2.stride[0] for block in backbone.res5] == [1, 1, 1]
    assert backbone.output_shape()["res5"].stride == 16
    assert backbone(torch.zeros(1, 3, 64, 64))["res5"].shape == (1, 2048, 4, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.RESNETS.DEPTH", 20), "DEPTH is 20; use one of"),
        (("MODEL.RESNETS.RES5_DILATION", 4), "RES5_DILATION is 4; use 1 or 2"),
        (("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES5_DILATION", 2), "needs .*DEPTH 50"),
    ],
)
def test_bad_resnet_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_detr_resnet_backbone(resnet_config(50, *overrides), RGB)


def test_largest_stride_is_the_default_and_any_output_can_be_chosen():
    images = ImageList(torch.zeros(1, 3, 32, 64), [(32, 40)])
    ((name, (feature, mask)),) = MaskedBackbone(TwoOutputs())(images).items()
    assert name == "b"
    assert feature.shape == (1, 6, 2, 4)
    assert mask.tolist() == [[[False, False, False, True]] * 2]
    backbone = MaskedBackbone(TwoOutputs(), in_features=["a"])
    assert backbone(images)["a"].tensor.shape == (1, 4, 4, 8)
    assert (backbone.channels, backbone.strides) == ({"a": 4}, {"a": 8})
    both = MaskedBackbone(TwoOutputs(), in_features=["a", "b"])(images)
    assert list(both) == ["a", "b"]
    assert [feature.mask.shape for feature in both.values()] == [(1, 4, 8), (1, 2, 4)]


def test_an_output_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"IN_FEATURES is \['p3'\].*'a', 'b'"):
        MaskedBackbone(TwoOutputs(), in_features=["p3"])
