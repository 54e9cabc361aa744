"""The layer residual in layers of torch, timm and Detectron2."""

import copy
from typing import Any

import pytest
import torch
from detectron2.modeling.backbone.swin import SwinTransformer, SwinTransformerBlock
from detectron2.modeling.backbone.vit import Block as VitBlock
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from miti_detr import add_layer_residual
from miti_detr.modeling.transformer import DecoderLayer, EncoderLayer
from miti_detr.rank import measure_rank

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}
PLACEMENTS = ("none", "before_norm", "after_norm")
ORDERS = pytest.mark.parametrize("pre_norm", [False, True], ids=["post", "pre"])
LAYOUTS = pytest.mark.parametrize("batch_first", [True, False])
EVERY = pytest.mark.parametrize("placement", PLACEMENTS)
ADDED = pytest.mark.parametrize("placement", PLACEMENTS[1:])


def shake(module: nn.Module) -> nn.Module:
    """Parameters away from 0 and 1, so that no norm or bias is invisible."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (0.5 if parameter.dim() == 1 else 0)
    return module


def pair(kind: str, placement: str, pre_norm: bool, batch_first: bool) -> tuple[Any, Any]:
    """Our layer with the residual, and torch's without, of the same weights."""
    theirs: Any = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
    ours: Any = {"encoder": EncoderLayer, "decoder": DecoderLayer}
    own = ours[kind](
        d_model=16,
        nhead=2,
        dim_feedforward=32,
        dropout=0.0,
        pre_norm=pre_norm,
        layer_residual=placement,
    )
    other = theirs[kind](16, 2, 32, 0.0, batch_first=batch_first, norm_first=pre_norm)
    own.load_state_dict(shake(other).state_dict())
    return own.eval(), other.eval()


@EVERY
@ORDERS
@LAYOUTS
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "fast path"])
def test_torch_encoder_layer_equals_ours(
    placement: str, pre_norm: bool, batch_first: bool, grad: bool
) -> None:
    """In evaluation without gradients torch has a fused path, which must not be taken."""
    own, other = pair("encoder", placement, pre_norm, batch_first)
    x = torch.randn(2, 7, 16)
    handed = x if batch_first else x.transpose(0, 1)
    with torch.set_grad_enabled(grad), add_layer_residual(other, placement=placement):
        y = other(handed)
    torch.testing.assert_close(y if batch_first else y.transpose(0, 1), own(x), **CLOSE)


@EVERY
@ORDERS
@LAYOUTS
def test_torch_decoder_layer_equals_ours(placement: str, pre_norm: bool, batch_first: bool) -> None:
    own, other = pair("decoder", placement, pre_norm, batch_first)
    x, memory = torch.randn(2, 7, 16), torch.randn(2, 9, 16)
    handed = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
    with add_layer_residual(other, placement=placement):
        y = other(tgt=handed[0], memory=handed[1])
    torch.testing.assert_close(
        y if batch_first else y.transpose(0, 1), own(x, memory, memory), **CLOSE
    )


@ADDED
@ORDERS
def test_torch_stack_with_padding(placement: str, pre_norm: bool) -> None:
    """The stack's own short cut (nested tensors) gives way, and comes back."""
    own, other = pair("encoder", placement, pre_norm, batch_first=True)
    stack = nn.TransformerEncoder(other, 2, enable_nested_tensor=not pre_norm).eval()
    x, padding = torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    with torch.no_grad():
        plain = stack(x, src_key_padding_mask=padding)
        with add_layer_residual(stack, placement=placement):
            y = stack(x, src_key_padding_mask=padding)
        mask = ~padding[:, None, None]
        expected = own(own(x, None, mask), None, mask)
        torch.testing.assert_close(y[~padding], expected[~padding], **CLOSE)
        again = stack(x, src_key_padding_mask=padding)
    torch.testing.assert_close(again, plain, **EXACT)


def blocks() -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    swin = SwinTransformerBlock(16, 2, window_size=4, shift_size=2)
    swin.H, swin.W = 8, 4
    mask = torch.zeros(2, 16, 16)
    return {
        "timm": (Block(16, 2, init_values=0.1), (torch.randn(2, 7, 16),)),
        "vit": (VitBlock(16, 2, use_residual_block=True), (torch.randn(2, 6, 5, 16),)),
        "vit windows": (VitBlock(16, 2, window_size=4), (torch.randn(2, 6, 5, 16),)),
        "swin": (swin, (torch.randn(1, 32, 16), mask)),
    }


@ADDED
@pytest.mark.parametrize("name", ["timm", "vit", "vit windows", "swin"])
def test_pre_norm_blocks(name: str, placement: str) -> None:
    """before_norm: norm1(x) + block(x); after_norm: x + block(x)."""
    torch.manual_seed(0)
    block, args = blocks()[name]
    shake(block).eval()
    x: Tensor = args[0]
    plain = block(*args)
    expected = plain + (x if placement == "after_norm" else block.norm1(x))
    with add_layer_residual(block, placement=placement):
        torch.testing.assert_close(block(*args), expected, **CLOSE)
    torch.testing.assert_close(block(*args), plain, **EXACT)


def vision_transformer() -> VisionTransformer:
    torch.manual_seed(0)
    net = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5
    )
    return shake(net).eval()  # type: ignore[return-value]


def test_state_dict_and_everything_else_stays() -> None:
    net, image = vision_transformer(), torch.randn(1, 3, 32, 32)
    plain, keys = net(image), list(net.state_dict())
    modules = len(list(net.modules()))
    added = add_layer_residual(net, placement="before_norm")
    changed = net(image)
    assert (changed - plain).abs().max() > 1e-2
    assert list(net.state_dict()) == keys
    assert len(list(net.modules())) == modules
    torch.testing.assert_close(copy.deepcopy(net)(image), changed, **EXACT)
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    torch.testing.assert_close(net(image), changed, **EXACT)
    added.remove()
    added.remove()
    torch.testing.assert_close(net(image), plain, **EXACT)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_layers_are_chosen_by_name() -> None:
    net, image = vision_transformer(), torch.randn(1, 3, 32, 32)
    with add_layer_residual(net, placement="after_norm", layers=["blocks.1"]) as one:
        assert list(one.residuals) == ["blocks.1"]
        first = net(image)
    with add_layer_residual(net, placement="after_norm", layers=["blocks"]) as every:
        assert list(every.residuals) == ["blocks.0", "blocks.1", "blocks.2"]
        assert (net(image) - first).abs().max() > 1e-2


def test_strength_ramps() -> None:
    net, image = vision_transformer(), torch.randn(1, 3, 32, 32)
    plain = net(image)
    with add_layer_residual(net, placement="before_norm") as added:
        for residual in added.residuals.values():
            residual.strength = 0.0
        torch.testing.assert_close(net(image), plain, **CLOSE)


def test_gradients_pass_the_new_path() -> None:
    """A layer that adds nothing but its input: d out / d x = 2 I with after_norm (pre-norm)."""
    block = Block(4, 1).eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 3, 4, requires_grad=True)
    with add_layer_residual(block, placement="after_norm"):
        block(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_a_failed_forward_leaves_nothing_behind() -> None:
    own, other = pair("encoder", "before_norm", pre_norm=False, batch_first=True)
    x = torch.randn(2, 7, 16)
    with add_layer_residual(other, placement="before_norm"):
        with pytest.raises(RuntimeError):
            other(x, src_mask=torch.zeros(3, 3))
        torch.testing.assert_close(other(x), own(x), **CLOSE)


def test_errors() -> None:
    net = vision_transformer()
    with pytest.raises(ValueError, match="placement 'on' is not one of none, before_norm"):
        add_layer_residual(net, placement="on")
    with pytest.raises(ValueError, match=r"'norm' is a LayerNorm and holds no layer of a known"):
        add_layer_residual(net, placement="after_norm", layers=["norm"])
    with pytest.raises(ValueError, match=r"'blocks.7' is no module .* blocks.0, blocks.1"):
        add_layer_residual(net, placement="after_norm", layers=["blocks.7"])
    parallel = ParallelScalingBlock(16, 2)
    with pytest.raises(ValueError, match=r"ParallelScalingBlock has no layer of a known kind"):
        add_layer_residual(parallel, placement="after_norm")
    own, _ = pair("encoder", "none", pre_norm=False, batch_first=True)
    with pytest.raises(ValueError, match=r"MODEL\.DETR\.LAYER_RESIDUAL"):
        add_layer_residual(own, placement="after_norm")
    added = add_layer_residual(net, placement="before_norm")
    with pytest.raises(ValueError, match=r"'blocks\.0' has a layer residual already"):
        add_layer_residual(net, placement="after_norm")
    added.remove()
    assert not any(m._forward_hooks for m in net.modules())


def test_rank_of_other_libraries() -> None:
    """after_norm keeps the tokens of a timm and of a Swin network further from rank one."""
    image = torch.randn(1, 3, 32, 32)
    net = vision_transformer()
    plain = measure_rank(net, image)["blocks"]
    with add_layer_residual(net, placement="after_norm"):
        changed = measure_rank(net, image)["blocks"]
    assert len(plain) == len(changed) == 4
    assert plain[0] == changed[0]
    assert plain[1]["residual"] != changed[1]["residual"]
    swin = SwinTransformer(embed_dim=16, depths=(2, 2), num_heads=(2, 2), out_indices=(1,))
    found = measure_rank(swin, torch.randn(1, 3, 64, 64))
    assert {len(layers) for layers in found.values()} == {3}
    assert len(found) == 2
