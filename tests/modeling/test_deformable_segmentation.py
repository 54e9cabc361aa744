"""Masks of Deformable-DETR."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.export.tensor_detector import TensorDetector
from miti_detr.modeling.deformable_segmentation import DeformableSegmentationDetr
from tests.modeling.deformable.helpers import tiny
from tests.modeling.segmentation.helpers import mask_input

OUT = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"])
KINDS = ["single_scale", "base", "refine", "two_stage"]


def config(kind, *overrides):
    levels = ["res3"] if kind == "single_scale" else ["res3", "res4"]
    return tiny(kind, *OUT, "MODEL.DETR.IN_FEATURES", levels, *overrides)


def made(kind, *overrides):
    torch.manual_seed(0)
    return build_model(config(kind, "MODEL.MASK_ON", True, *overrides))


def batch():
    """Images of two sizes, so that both are padded."""
    return [
        mask_input((64, 96), [[4, 4, 30, 20], [20, 10, 50, 36]], [0, 2]),
        mask_input((80, 72), [[2, 3, 22, 40]], [1], seed=1),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_inference(kind):
    model = made(kind).train()
    assert type(model) is DeformableSegmentationDetr
    assert model.pyramid == (("res2",) if kind == "single_scale" else ("res3", "res2"))
    with EventStorage():
        losses = model(batch())
    assert {"loss_mask", "loss_dice"} < set(losses)
    assert ("loss_ce_enc" in losses) == (kind == "two_stage")
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.mask_head.parameters())
    assert all(p.grad is not None for p in model.bbox_attention.parameters())
    with torch.no_grad():
        results = model.eval()(batch())
    shapes = [tuple(r["instances"].pred_masks.shape[1:]) for r in results]
    assert shapes == [(64, 96), (80, 72)]


@pytest.mark.parametrize("kind", ["single_scale", "base"])
@torch.no_grad()
def test_queries_look_at_the_level_of_the_last_feature(kind):
    model = made(kind).eval()
    images = model.preprocess_image(batch())
    encoded = model.encode(images)
    decoded = model.decode(encoded, model.embed_queries(batch()))
    grid = model.grid(encoded, decoded)
    features = [encoded.features[name].tensor for name in model.levels]
    torch.testing.assert_close(grid.source, model.input_proj(features)[len(features) - 1])
    assert torch.equal(grid.mask, encoded.features[model.levels[-1]].mask.to(grid.mask.device))
    assert grid.memory.shape == grid.source.shape
    tokens = grid.memory.flatten(2).transpose(1, 2)
    level = len(features) - 1
    start = sum(h * w for h, w in encoded.pyramid.shapes[:level])
    assert torch.equal(tokens, decoded.memory[:, start : start + tokens.shape[1]])


@torch.no_grad()
def test_masks_do_not_change_the_detector(tmp_path):
    """Weights of a detector load, and its detections and losses of boxes stay."""
    detector = build_model(config("base")).eval()
    MitiDetrCheckpointer(detector, str(tmp_path)).save("model")
    path = str(tmp_path / "model.pth")
    model = made("base", "MODEL.DETR.FROZEN_WEIGHTS", path)
    with EventStorage():
        model.train()(batch())  # loads them before the first step
    expected, found = detector.predict(batch()), model.eval().predict(batch())
    torch.testing.assert_close(found.boxes, expected.boxes)
    torch.testing.assert_close(found.logits, expected.logits)
    losses = model.train().losses(model.predict(batch()), batch())
    with_boxes = detector.losses(expected, batch())
    torch.testing.assert_close({k: losses[k] for k in with_boxes}, with_boxes)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}


@torch.no_grad()
def test_panoptic_with_focal_loss():
    """The last class is one of the objects: there is no column for "no object"."""
    model = made("base", "MODEL.DETR.STUFF_CLASSES", [1, 2], "TEST.PANOPTIC_THRESHOLD", 0.4).eval()
    for head in model.class_embed:
        head.bias.copy_(torch.tensor([-9.0, -9.0, 0.0]))
        head.weight.zero_()
    for output in model(batch()):
        ids, segments = output["panoptic_seg"]
        assert [s["category_id"] for s in segments] == [2]
        assert set(ids.unique().tolist()) == {1}
        assert len(output["instances"]) == 0 or set(output["instances"].pred_classes.tolist()) == {
            0
        }


@torch.no_grad()
def test_exported_masks_are_those_of_the_model():
    model = made("refine", "MODEL.ACCELERATE", False).eval()
    inputs = batch()
    images = torch.zeros(2, 3, 80, 96, dtype=torch.uint8)
    for row, item in zip(images, inputs, strict=True):
        row[:, : item["image"].shape[1], : item["image"].shape[2]] = item["image"]
    sizes = torch.tensor([item["image"].shape[1:] for item in inputs])
    _, scores, _, masks = TensorDetector(model, masks=True, top_k=4)(images, sizes)
    prediction = model.predict(inputs)
    found = model.read_classes(prediction.logits[-1])
    torch.testing.assert_close(scores, found.scores[:, :4])
    wanted = torch.stack([x[q[:4]] for x, q in zip(prediction.masks, found.queries, strict=True)])
    torch.testing.assert_close(masks, wanted)
