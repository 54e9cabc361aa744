"""Every backbone that can be named in a config trains a step in a MitiDetr."""

import sys

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, SimpleFeaturePyramid, build_backbone, build_model
from detectron2.modeling.backbone import swin, vit
from detectron2.structures import ImageList

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.modeling import MaskedBackbone, TimmBackbone
from tests.helpers import tiny_config, training_input
from tests.modeling.backbones.test_masked_backbone import resnet_config

RGB = ShapeSpec(channels=3)
LEVELS = ["res2", "res3", "res4", "res5"]
FPN_KEYS = (
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", LEVELS),
    *("MODEL.RESNETS.OUT_FEATURES", LEVELS, "MODEL.DETR.IN_FEATURES", ["p4"]),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
)
SWIN = (
    *("MODEL.BACKBONE.NAME", "build_swin_backbone", "MODEL.SWIN.EMBED_DIM", 32),
    *("MODEL.SWIN.DEPTHS", (2, 2, 2, 2)),
)
VIT = (
    *("MODEL.BACKBONE.NAME", "build_vit_backbone", "MODEL.VIT.EMBED_DIM", 64),
    *("MODEL.VIT.IMG_SIZE", 96),
)
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME")
SMALL = [
    pytest.param(("MODEL.RESNETS.DEPTH", 34), 8, id="R34"),
    pytest.param((*FPN_KEYS, "MODEL.FPN.OUT_CHANNELS", 16), 16, id="R18-FPN p4"),
    pytest.param((*FPN_KEYS, "MODEL.FPN.NORM", "FrozenBN"), 16, id="R18-FPN norm"),
    pytest.param(SWIN, 32, id="Swin"),
    pytest.param((*SWIN, "MODEL.DETR.IN_FEATURES", ["p2"]), 16, id="Swin p2"),
    pytest.param(VIT, 16, id="ViT"),
    pytest.param((*TIMM, "test_resnet"), 32, id="timm ResNet"),
    pytest.param((*TIMM, "test_convnext"), 32, id="timm ConvNeXt"),
    pytest.param((*TIMM, "test_efficientnet"), 32, id="timm EfficientNet"),
    pytest.param(
        (*TIMM, "test_efficientnet", "MODEL.DETR.IN_FEATURES", ["timm3"]), 16, id="timm stride 16"
    ),
]
LARGE = [
    pytest.param(resnet_config(50), 32, id="R50"),
    pytest.param(resnet_config(50, "MODEL.RESNETS.RES5_DILATION", 2), 16, id="R50-DC5"),
    pytest.param(resnet_config(101), 32, id="R101"),
    pytest.param(tiny_config("MODEL.BACKBONE.NAME", "build_swin_backbone"), 32, id="Swin-T"),
]


def step(cfg, sizes):
    """Losses of one training step, with its gradients; one optimizer step must change the loss."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    inputs = [
        training_input(size, [[4, 5, 20, 30]], [i % 3], seed=i) for i, size in enumerate(sizes)
    ]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    total = sum(model(inputs).values())
    total.backward()
    assert torch.isfinite(total)
    optimizer.step()
    assert sum(model(inputs).values()) != total
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "stride"), SMALL)
def test_small_backbone_trains_a_step(overrides, stride):
    """Two images of sizes that are no multiples of anything."""
    cfg = tiny_config(*overrides)
    model = step(cfg, [(64, 47), (41, 72)])
    assert list(model.backbone.strides.values()) == [stride]
    grads = {n: p.grad for n, p in model.backbone.named_parameters() if p.requires_grad}
    idle = [n for n, grad in grads.items() if grad is None]
    assert model.backbone.has_idle_parts or not idle
    with torch.no_grad():
        assert len(model.eval()([training_input((50, 61), [], [])])) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("cfg", "stride"), LARGE)
def test_large_backbone_trains_a_step(cfg, stride):
    cfg.merge_from_list(["MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1])
    assert list(step(cfg, [(64, 64)]).backbone.strides.values()) == [stride]


@pytest.mark.slow
def test_dc5_is_the_default_output_although_res4_has_its_stride():
    """With the four outputs that the published YAML files name."""
    cfg = resnet_config(50, "MODEL.RESNETS.RES5_DILATION", 2)
    assert cfg.MODEL.RESNETS.OUT_FEATURES == LEVELS
    cfg.MODEL.BACKBONE.NAME = "build_detr_resnet_backbone"
    backbone = MaskedBackbone(build_backbone(cfg))
    assert (backbone.channels, backbone.strides) == ({"res5": 2048}, {"res5": 16})
    assert not backbone.has_idle_parts
    assert MaskedBackbone(build_backbone(cfg), in_features=["res4"]).has_idle_parts


def frozen(*overrides):
    """Names of the frozen parameters of the body, without the rest of the name."""
    cfg = tiny_config(*overrides)
    named = build_backbone(cfg).named_parameters()
    return sorted({n.removeprefix("net.") for n, p in named if not p.requires_grad})


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (SWIN, [["patch_embed"], ["layers.0"], ["layers.1"]]),
        (VIT, [["patch_embed", "pos_embed"], ["blocks.0"], ["blocks.1"]]),
        ((*TIMM, "test_resnet"), [["conv1"], ["layer1"], ["layer2"]]),
        ((*TIMM, "test_convnext"), [["stem_0", "stem_1", "stages_0"], ["stages_1"], ["stages_2"]]),
        (
            (*TIMM, "test_efficientnet"),
            [["conv_stem", "blocks.0"], ["blocks.1"], ["blocks.2"]],
        ),
    ],
)
def test_freeze_at_freezes_from_the_image_on(overrides, parts):
    key = "MODEL.BACKBONE.FREEZE_AT"
    assert frozen(*overrides, key, 0) == []
    expected: list[str] = []
    for freeze_at, more in enumerate(parts, start=1):
        expected += more
        names = frozen(*overrides, key, freeze_at)
        assert all(any(n.startswith(part) for part in expected) for n in names)
        assert all(any(n.startswith(part) for n in names) for part in expected)


def test_timm_norms_are_frozen():
    norms = [type(m).__name__ for m in TimmBackbone("test_resnet").modules()]
    assert "FrozenBatchNormAct2d" in norms or "FrozenBatchNorm2d" in norms
    assert not any(name.startswith("BatchNorm") for name in norms)


def test_vit_takes_a_square_and_says_so():
    """Padded to 96 x 96; the mask knows the true size; a larger image is an error."""
    model = build_model(tiny_config(*VIT))
    images = model.preprocess_image([training_input((40, 60), [], [])])
    assert images.tensor.shape == (1, 3, 96, 96)
    ((feature, mask),) = model.backbone(images).values()
    assert feature.shape == (1, 64, 6, 6)
    assert (~mask).sum() == 3 * 4
    with pytest.raises(ValueError, match=r"side of 100 pixels.*at most 96: lower INPUT.MAX_SIZE"):
        model.preprocess_image([training_input((40, 100), [], [])])


def test_sizes_that_detectron2_backbones_need():
    """Also those whose attribute or key is misspelled there."""
    body = swin.SwinTransformer(embed_dim=8, depths=(1,), num_heads=(1,), out_indices=(0,))
    with pytest.raises(AttributeError):
        _ = body.size_divisibility
    assert MaskedBackbone(body, size_divisibility=6).padding_constraints() == {
        "size_divisibility": 6,
        "square_size": 0,
    }
    net = vit.ViT(img_size=64, embed_dim=8, depth=1, num_heads=1)
    pyramid = SimpleFeaturePyramid(net, "last_feat", 8, (1.0, 0.5), square_pad=64)
    backbone = MaskedBackbone(pyramid, in_features=["p4"])
    assert backbone.padding_constraints() == {"size_divisibility": 32, "square_size": 64}
    images = ImageList.from_tensors(
        [torch.zeros(3, 40, 50)], padding_constraints=backbone.padding_constraints()
    )
    assert backbone(images)["p4"].tensor.shape == (1, 8, 4, 4)
    fpn = build_backbone(tiny_config(*FPN_KEYS))
    assert isinstance(fpn, FPN)
    assert (
        MaskedBackbone(fpn, size_divisibility=48).padding_constraints()["size_divisibility"] == 96
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((*SWIN, "MODEL.DETR.IN_FEATURES", ["p5"]), r"IN_FEATURES is \['p5'\]; with Swin"),
        ((*SWIN, "MODEL.SWIN.EMBED_DIM", 48), "SWIN.EMBED_DIM is 48.* a multiple of 32"),
        ((*VIT, "MODEL.VIT.IMG_SIZE", 90), "IMG_SIZE is 90.* a multiple of 16"),
        ((*TIMM, "resnot"), "MODEL.TIMM.NAME is 'resnot'; timm says"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config(*overrides))


@pytest.mark.parametrize("overrides", [SWIN, VIT, (*TIMM, "test_resnet")])
def test_missing_timm_names_the_extra(overrides, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"needs timm: `pip install 'miti_detr\[timm\]'"):
        build_backbone(tiny_config(*overrides))


@pytest.mark.parametrize("overrides", [SWIN, VIT], ids=["Swin", "ViT"])
def test_pretrained_weights_by_matching_heuristics(overrides, tmp_path):
    """Files of the original authors: their own keys, and a head of which there is no use."""
    models = [build_model(tiny_config(*overrides)) for _ in range(2)]
    body = models[0].backbone.body.state_dict()
    weights = {**body, "head.weight": torch.ones(5, 64), "norm.weight": torch.ones(64)}
    torch.save({"model": weights}, tmp_path / "w.pth")
    checkpointer = MitiDetrCheckpointer(models[1], for_training=True)
    checkpointer.load(f"{tmp_path / 'w.pth'}?matching_heuristics=True")
    for key, value in models[1].backbone.body.state_dict().items():
        torch.testing.assert_close(value, body[key], rtol=0, atol=0)
