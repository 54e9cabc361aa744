"""Residual blocks that leave ReLU and addition to their convolutions: the same function."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_resnet_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock, CNNBlockBase

from miti_detr.accelerate import checkpoint_activations
from miti_detr.accelerate.frozen_batch_norm import apply as fold_frozen_batch_norm
from miti_detr.accelerate.residual_blocks import FusedStage as Stage
from miti_detr.accelerate.residual_blocks import apply as fuse_residual_blocks
from tests.fill import filled
from tests.helpers import tiny_config

FEATURES = ["stem", "res2", "res3", "res4", "res5"]


def resnet(depth=50, *overrides, norm="FrozenBN"):
    width = 64 if depth < 50 else 256
    cfg = tiny_config(
        *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", width),
        *("MODEL.RESNETS.OUT_FEATURES", FEATURES, "MODEL.BACKBONE.FREEZE_AT", 2),
        *overrides,
    )
    model = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    model.load_state_dict(filled(model.state_dict(), "backbone."))
    return model


def fused(model):
    model = copy.deepcopy(model)
    fold_frozen_batch_norm(model)
    fuse_residual_blocks(model)
    return model.to(memory_format=torch.channels_last)


def images():
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def assert_alike(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        largest = expected.abs().max().item()
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance * largest)


NETWORKS = {
    "R18": (18,),
    "R50": (50,),
    "R50, stride in 1x1": (50, "MODEL.RESNETS.STRIDE_IN_1X1", True),
    "ResNeXt": (50, "MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
    "DC5": (50, "MODEL.RESNETS.RES5_DILATION", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_all_features_without_gradient(network):
    plain = resnet(*network)
    ours = fused(plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        expected = plain(images())
        for _ in range(2):
            assert_alike(ours(images()), expected)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_alike({k: v.float() for k, v in ours(images()).items()}, expected, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_features_and_gradients_in_training(recompute):
    """With the stem and res2 frozen, which are computed without gradient."""
    plain = resnet(50).double().train()
    ours = fused(plain)
    if recompute:
        assert checkpoint_activations(ours, (CNNBlockBase,)) == (17, 0)  # the stem, too
    results = []
    for model in (plain, ours):
        features = model(images().double())
        sum((f**2).mean() for f in features.values()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(({k: v.detach() for k, v in features.items()}, gradients))
    assert_alike(results[1][0], results[0][0], 1e-10)
    assert_alike(results[1][1], results[0][1], 1e-10)


def keep_input_and_output(name, module, held, clone=False):
    def keep(what, tensor):
        held[f"{name} {what}"] = tensor.clone() if clone else tensor

    module.register_forward_pre_hook(lambda m, x: keep("in", x[0]))
    module.register_forward_hook(lambda m, x, y: keep("out", y))


@pytest.mark.parametrize(("kinds", "count"), [((BottleneckBlock,), 32), ((Conv2d,), 106)])
def test_hooks_see_what_a_module_returns(kinds, count):
    """Nothing that a hook holds is overwritten, and convolutions leave ReLU and addition out."""
    plain = resnet(50)
    seen = []
    for model in (plain, fused(plain)):
        held = {}
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                keep_input_and_output(name, module, held, kinds == (Conv2d,))
        with torch.no_grad():
            model(images())
        seen.append(held)
    assert len(seen[0]) == count
    assert_alike(seen[1], seen[0])


@pytest.mark.slow
def test_what_is_changed():
    model = resnet(50)
    assert fuse_residual_blocks(model) == 0  # nothing is folded
    fold_frozen_batch_norm(model)
    assert fuse_residual_blocks(model) == 17
    assert fuse_residual_blocks(model) == 0
    assert all(isinstance(stage, Stage) for stage in model.stages)
    other = resnet(50, norm="GN")
    fold_frozen_batch_norm(other)
    assert fuse_residual_blocks(other) == 0
    assert not any(isinstance(stage, Stage) for stage in other.stages)


@pytest.mark.slow
def test_copies_and_pickles():
    ours = fused(resnet(18))
    with torch.no_grad():
        expected = ours(images())
        assert_alike(copy.deepcopy(ours)(images()), expected)
        assert_alike(pickle.loads(pickle.dumps(ours))(images()), expected)
