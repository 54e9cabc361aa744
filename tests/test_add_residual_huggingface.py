"""The layer residual in the layers of Hugging Face's detectors."""

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from miti_detr import add_layer_residual
from miti_detr.add_residual import known_layers
from miti_detr.checkpoint import to_hf
from miti_detr.rank import measure_rank
from tests.checkpoint.helpers import r50_config
from tests.checkpoint.test_checkpointer import RESNET18
from tests.checkpoint.test_deformable import SMALL
from tests.fill import filled, image
from tests.modeling.deformable.helpers import coco_config

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

CLOSE = {"rtol": 0, "atol": 2e-4}
SIZES = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SHAPES = [(3, 4), (2, 2)]


def layers_of(name: str) -> dict[str, Any]:
    """An encoder and a decoder layer of a model, with arguments other than the tokens."""
    folder = {
        "Detr": "detr",
        "ConditionalDetr": "conditional_detr",
        "DeformableDetr": "deformable_detr",
        "RTDetr": "rt_detr",
    }[name]
    module = __import__(f"transformers.models.{folder}.modeling_{folder}", fromlist=["x"])
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes: dict[str, Any] = {**SIZES, **heads, "num_feature_levels": 2}
    if name == "RTDetr":
        sizes |= {"encoder_hidden_dim": 32, "num_attention_heads": 4}
        sizes |= {"decoder_in_channels": [32, 32]}
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    made = {
        stack: getattr(module, f"{name}{stack}Layer")(config).eval()
        for stack in ("Encoder", "Decoder")
    }
    for parameter in (p for layer in made.values() for p in layer.parameters()):
        nn.init.normal_(parameter, std=0.2)
    return made


def arguments_of(name: str, stack: str) -> dict[str, Any]:
    levels = torch.tensor(SHAPES)
    points = {
        "spatial_shapes": levels,
        "spatial_shapes_list": SHAPES,
        "level_start_index": torch.tensor([0, 12]),
    }
    memory = torch.randn(2, 16, 32)
    if stack == "Encoder":
        if name != "DeformableDetr":
            return {"attention_mask": None}
        return {"attention_mask": None, "reference_points": torch.rand(2, 16, 2, 2), **points}
    if name == "Detr":
        return {"encoder_hidden_states": memory}
    if name == "ConditionalDetr":
        return {
            "encoder_hidden_states": memory,
            "spatial_position_embeddings": torch.randn(2, 16, 32),
            "query_position_embeddings": torch.randn(2, 16, 32),
            "query_sine_embed": torch.randn(2, 16, 32),
        }
    given = {"reference_points": torch.rand(2, 16, 2, 4), "encoder_hidden_states": memory}
    return {**given, **points}


@pytest.mark.parametrize("stack", ["Encoder", "Decoder"])
@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr", "DeformableDetr", "RTDetr"])
def test_layers_follow_the_rule(name: str, stack: str) -> None:
    """With t the last sum: LN(x + t), and x + LN(t)."""
    layer = layers_of(name)[stack]
    x, given = torch.randn(2, 16, 32), arguments_of(name, stack)
    sums: list[Tensor] = []
    with torch.no_grad():
        handle = layer.final_layer_norm.register_forward_pre_hook(
            lambda _, args: sums.append(args[0])
        )
        plain = layer(x, **given)
        handle.remove()
        expected = {
            "none": plain,
            "before_norm": layer.final_layer_norm(x + sums[0]),
            "after_norm": x + plain,
        }
        for placement, output in expected.items():
            with add_layer_residual(layer, placement=placement):
                found = layer(hidden_states=x, **given)
            torch.testing.assert_close(found, output, rtol=0, atol=1e-6)
        torch.testing.assert_close(layer(x, **given), plain, rtol=0, atol=0)


def pair(kind: str) -> tuple[Any, Any]:
    """Our Miti-DETR and Hugging Face's model of the same weights."""
    miti = ("MODEL.DETR.LAYER_RESIDUAL", "before_norm", "MODEL.DETR.PADDING_MASK", "nearest")
    detr = kind == "Detr"
    cfg = r50_config(*RESNET18, *miti) if detr else coco_config("refine", *SMALL, *miti)
    ours = build_model(cfg).eval()
    ours.load_state_dict(filled(ours.state_dict()))
    state, config = to_hf(ours.state_dict())
    made = getattr(transformers, f"{kind}Config").from_dict(config)
    theirs = getattr(transformers, f"{kind}ForObjectDetection")(made)
    names = {"out_proj": "o_proj", ".fc1": ".mlp.fc1", ".fc2": ".mlp.fc2"}
    names["backbone.conv_encoder.model"] = "backbone.model"
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not [k for k in missing if "num_batches_tracked" not in k]
    assert not unexpected
    return ours, theirs.eval()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["Detr", "DeformableDetr"])
def test_their_model_with_the_residual_is_ours(kind: str) -> None:
    """A padded batch on the same weights; rank reads both alike."""
    ours, theirs = pair(kind)
    images = [{"image": image("image:0", 96, 160)}, {"image": image("image:1", 128, 96)}]
    batch = ours.preprocess_image(images)
    mask = torch.zeros(2, *batch.tensor.shape[-2:], dtype=torch.int64)
    for row, (height, width) in zip(mask, batch.image_sizes, strict=True):
        row[:height, :width] = 1
    inputs = {"pixel_values": batch.tensor, "pixel_mask": mask}
    expected = ours.predict(images)
    before = theirs(**inputs).logits
    assert (before - expected.logits[-1]).abs().max() > 0.01
    with add_layer_residual(theirs, placement="before_norm") as added:
        found = theirs(**inputs)
        assert len(added.residuals) == len(known_layers(theirs)) > 0
        ranks, own = measure_rank(theirs, **inputs), measure_rank(ours, images)
    torch.testing.assert_close(found.logits, expected.logits[-1], **CLOSE)
    torch.testing.assert_close(found.pred_boxes, expected.boxes[-1], rtol=0, atol=2e-5)
    assert set(ranks) == set(own)
    for stack, layers in own.items():
        for theirs_layer, layer in zip(ranks[stack], layers, strict=True):
            values = layer.get("residual", [])
            assert theirs_layer.get("residual", []) == pytest.approx(values, rel=1e-3, nan_ok=True)
