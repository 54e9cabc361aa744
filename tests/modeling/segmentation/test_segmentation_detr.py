"""The model with masks: losses of matched queries, masks of detections, frozen detectors."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as mask_util

from miti_detr.modeling import MitiDetr
from miti_detr.modeling.segmentation import SegmentationDetr
from tests.helpers import tiny_config
from tests.modeling.backbones.test_backbones import FPN_KEYS
from tests.modeling.segmentation.helpers import MASKS, mask_config, mask_input, mask_model

R50 = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"])


def batch():
    """Two objects in 40 x 56 pixels, one in 48 x 32, so that both images are padded."""
    return [
        mask_input((40, 56), [[4, 4, 30, 20], [20, 10, 50, 36]], [0, 2]),
        mask_input((48, 32), [[2, 3, 22, 40]], [1], seed=1),
    ]


def test_mask_on_makes_the_model():
    assert type(mask_model()) is SegmentationDetr
    assert type(MitiDetr(mask_config())) is SegmentationDetr
    assert type(build_model(tiny_config())) is MitiDetr
    assert type(copy.deepcopy(mask_model())) is SegmentationDetr


@pytest.mark.parametrize("points", [0, 50])
def test_losses_are_those_of_all_queries(points):
    """The published way: masks of all queries of all images, then those of the matches."""
    made = mask_model("MODEL.DETR.MASK_POINTS", points).train()
    inputs = batch()
    torch.manual_seed(0)
    prediction = made.predict(inputs)
    torch.manual_seed(1)
    losses = made.losses(prediction, inputs)
    assert sorted(losses) == sorted(
        [f"loss_{x}{s}" for x in ("ce", "bbox", "giou") for s in ("", "_0")]
        + ["loss_mask", "loss_dice"]
    )
    if points:
        return
    targets = made.targets(inputs, torch.float32)
    pairs = made.criterion.matcher(prediction.logits[-1], prediction.boxes[-1], targets)
    focal, dice = torch.zeros(()), torch.zeros(())
    for masks, (queries, objects), item in zip(prediction.masks, pairs, inputs, strict=True):
        height, width = item["instances"].image_size
        for query, index in zip(queries, objects, strict=True):
            truth = torch.zeros(48, 56)
            truth[:height, :width] = item["instances"].gt_masks.tensor[index]
            logits = F.interpolate(masks[query][None, None], (48, 56), mode="bilinear")[0, 0]
            p = logits.sigmoid()
            p_t, a_t = torch.where(truth > 0, p, 1 - p), torch.where(truth > 0, 0.25, 0.75)
            focal = focal - (a_t * (1 - p_t) ** 2 * p_t.log()).mean()
            dice = dice + 1 - (2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1)
    torch.testing.assert_close(losses["loss_mask"], focal / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["loss_dice"], dice / 3, rtol=1e-5, atol=1e-6)


def test_padding_to_a_multiple_belongs_to_the_frame():
    made = mask_model("MODEL.DETR.SIZE_DIVISIBILITY", 64).train()
    assert made.predict(batch()).padded == (64, 64)
    assert all(torch.isfinite(x) for x in made(batch()).values())


def test_polygons_equal_bitmasks():
    made = mask_model().eval()  # batch norm without changing statistics
    inputs, same = batch(), batch()
    for item in same:
        boxes = item["instances"].gt_boxes.tensor.tolist()
        polygons = [[np.array([a, b, c, b, c, d, a, d])] for a, b, c, d in boxes]
        item["instances"].gt_masks = PolygonMasks(polygons)
    prediction = made.predict(inputs)
    losses = [made.losses(prediction, x) for x in (inputs, same)]
    assert {k: v.item() for k, v in losses[0].items()} == {
        k: v.item() for k, v in losses[1].items()
    }


def test_ground_truth_that_does_not_fit():
    made, inputs = mask_model().train(), batch()
    inputs[0]["instances"].gt_masks = BitMasks(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match=r"have \(8, 8\) pixels in an image of \(40, 56\)"):
        made(inputs)
    inputs[0]["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match=r"need 'gt_masks'.*MODEL\.MASK_ON True"):
        made(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["none", "before_norm", "after_norm"])
@pytest.mark.parametrize("points", [0, 20])
def test_training_step_reaches_every_parameter(residual, points):
    made = mask_model(
        "MODEL.DETR.LAYER_RESIDUAL", residual, "MODEL.DETR.MASK_POINTS", points
    ).train()
    with EventStorage():
        sum(made(batch()).values()).backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    # Queries are 0 before the first decoder layer, where these have nothing to act on.
    idle = [f"decoder.layers.0.{part}" for part in ("self_attn", "norm1.w", "norm2.w")]
    assert [n for n in without if not any(part in n for part in idle)] == []


def test_a_batch_without_objects_has_gradients_of_zero():
    """With several processes, each parameter needs one."""
    made = mask_model().train()
    losses = made([mask_input((40, 56), [], [])])
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in made.mask_head.parameters())
    assert all(p.grad is not None for p in made.bbox_attention.parameters())


@torch.no_grad()
def test_predict_equals_the_masks_of_pairs():
    made = mask_model().eval()
    prediction = made.predict(batch())
    assert prediction.masks.shape == (2, 7, 12, 14)
    image, query = torch.tensor([1, 0]), torch.tensor([3, 5])
    pairs = made.mask_logits(prediction, image, query)
    torch.testing.assert_close(pairs, prediction.masks[image, query], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_detections_have_masks_in_their_output_frame():
    """Bilinear to the padded batch, without the padding, bilinear to the output, then above 0."""
    made, inputs = mask_model().eval(), batch()
    inputs[0].update(height=90, width=111)
    prediction = made.predict(inputs)
    plain = [set(x["instances"].get_fields()) for x in made(inputs)]
    assert plain == [{"pred_boxes", "scores", "pred_classes", "pred_masks"}] * 2
    sizes = ((40, 56), (48, 32))
    for index, (output, size) in enumerate(zip(made(inputs), sizes, strict=True)):
        found = output["instances"]
        frame = found.image_size
        logits = F.interpolate(prediction.masks[index][None], (48, 56), mode="bilinear")
        logits = F.interpolate(logits[..., : size[0], : size[1]], frame, mode="bilinear")[0]
        expected = logits[found.scores.new_tensor(range(7)).long()[: len(found)]] > 0
        assert len(found) == 7  # no box is empty
        assert found.pred_masks.dtype == torch.bool
        assert (found.pred_masks != expected).float().mean() < 1e-4  # rounding near 0
        assert 0.01 < expected.float().mean() < 0.99


@torch.no_grad()
def test_run_lengths_are_the_same_masks():
    made, inputs = mask_model().eval(), batch()
    masks = [x["instances"].pred_masks for x in made(inputs)]
    made.mask_format = "rle"
    for expected, output in zip(masks, made(inputs), strict=True):
        found = output["instances"]
        decoded = mask_util.decode(list(found.pred_masks)).transpose(2, 0, 1)
        assert (decoded == expected.numpy()).all()
        assert len(found[found.scores > found.scores.median()].pred_masks) == 3
        one = found[found.scores.argmax()[None]].pred_masks
        assert list(one) == [found.pred_masks[int(found.scores.argmax())]]
        joined = Instances.cat([found, found[2:4]])
        assert list(joined.pred_masks)[7:] == list(found.pred_masks)[2:4]
        picture = Visualizer(np.zeros((*found.image_size, 3), np.uint8)).draw_instance_predictions(
            found
        )
        assert picture.get_image().any()


@torch.no_grad()
def test_low_scores_are_left_out():
    made = mask_model().eval()
    everything = made(batch())[0]["instances"]
    made.min_score = everything.scores.median().item()
    found = made(batch())[0]["instances"]
    assert found.scores.tolist() == everything.scores[everything.scores >= made.min_score].tolist()
    torch.testing.assert_close(
        found.pred_masks.float().mean((1, 2)),
        everything.pred_masks[everything.scores >= made.min_score].float().mean((1, 2)),
        rtol=0,
        atol=1e-3,
    )
    for mask_format in ("bool", "rle"):
        made.min_score, made.mask_format = 1.0, mask_format
        assert len(made(batch())[0]["instances"].pred_masks) == 0


@torch.no_grad()
def test_panoptic_output():
    """Stuff is not among the instances; without a confident query there is no segment."""
    made = mask_model("MODEL.DETR.STUFF_CLASSES", [1, 2], "TEST.PANOPTIC_THRESHOLD", 0.0).eval()
    made.class_embed.weight.mul_(20)
    made.class_embed.bias[-1] = -100
    inputs = batch()
    inputs[0].update(height=90, width=111)
    metadata = Metadata().set(thing_classes=["a", "b", "c"], stuff_classes=["a", "b", "c"])
    for output, size in zip(made(inputs), ((90, 111), (48, 32)), strict=True):
        ids, segments = output["panoptic_seg"]
        assert tuple(ids.shape) == size
        assert set(ids.unique().tolist()) == {s["id"] for s in segments}
        assert segments
        assert all(s["isthing"] == (s["category_id"] == 0) for s in segments)
        assert set(output["instances"].pred_classes.tolist()) <= {0}
        classes = [s["category_id"] for s in segments if not s["isthing"]]
        assert len(set(classes)) == len(classes)
        picture = Visualizer(np.zeros((*size, 3), np.uint8), metadata)
        assert picture.draw_panoptic_seg(ids, segments).get_image().any()
    made.panoptic_threshold = 1.0
    ids, segments = made(inputs)[0]["panoptic_seg"]
    assert (segments, ids.any().item()) == ([], False)


def test_frozen_detector_has_neither_gradients_nor_dropout(tmp_path):
    path = str(tmp_path / "detector.pth")
    torch.save({"model": build_model(tiny_config()).state_dict()}, path)
    frozen = ("MODEL.DETR.FROZEN_WEIGHTS", path, "MODEL.DETR.WEIGHTS_RESIDUAL", "before_norm")
    made = mask_model(*frozen, "MODEL.DETR.DROPOUT", 0.5).train()
    assert made.training
    trained = {name.split(".")[0] for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"bbox_attention", "mask_head"}
    first, second = made(batch()), made(batch())
    assert {k: v.item() for k, v in first.items()} == {k: v.item() for k, v in second.items()}
    sum(first.values()).backward()
    assert all(p.grad is not None for p in made.mask_head.parameters())
    detector = torch.load(path)["model"]
    assert all(torch.equal(made.state_dict()[k], v) for k, v in detector.items())


def test_accelerated_model_computes_the_same():
    """Masks also need what the stages of the backbone return, not only its last output."""
    plain = mask_model(*R50, "MODEL.ACCELERATE", False)
    fast = mask_model(*R50)
    fast.load_state_dict(plain.state_dict())
    inputs = batch()
    with torch.no_grad():
        found = fast.eval().predict(inputs).masks
        torch.testing.assert_close(found, plain.eval().predict(inputs).masks, rtol=1e-4, atol=1e-4)
    losses, expected = fast.train()(inputs), plain.train()(inputs)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_losses_in_float32():
    made = mask_model().train()
    kinds = []
    made.mask_head.register_forward_hook(lambda *x: kinds.append(x[-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = made(batch())
    assert kinds == [torch.bfloat16]
    assert all(loss.dtype == torch.float32 for loss in losses.values())


@torch.no_grad()
def test_mixed_precision_in_inference():
    made = mask_model("TEST.AMP.ENABLED", True).eval()
    kinds = []
    made.mask_head.register_forward_hook(lambda *x: kinds.append(x[-1].dtype))
    assert made(batch())[0]["instances"].pred_masks.dtype == torch.bool
    assert set(kinds) == {torch.bfloat16}


def test_features_of_the_pyramid():
    """By decreasing stride; of DC5, res4 has the stride of res5 and is used as published."""
    made = mask_model("MODEL.RESNETS.OUT_FEATURES", ["res5", "res2", "res4", "res3"])
    assert made.pyramid == ("res4", "res3", "res2")
    assert made.backbone.in_features[-1] == "res5"
    made = mask_model(*R50, "MODEL.DETR.IN_FEATURES", ["res2", "res4"])
    assert (made.pyramid, made.backbone.in_features[-1]) == (("res2",), "res4")
    assert made.variant["mask_features"] == ["res2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "pyramid"),
    [
        (FPN_KEYS, ("p3", "p2")),
        (("MODEL.BACKBONE.NAME", "build_timm_backbone"), ("timm3", "timm2", "timm1")),
    ],
)
def test_other_backbones_have_masks(overrides, pyramid):
    pytest.importorskip("timm")
    made = mask_model(*overrides, "MODEL.TIMM.NAME", "test_resnet").train()
    assert made.pyramid == pyramid
    assert all(torch.isfinite(loss) for loss in made(batch()).values())
    assert made.eval()(batch())[0]["instances"].pred_masks.shape[1:] == (40, 56)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.RESNETS.OUT_FEATURES", ["res3"]), "no output larger than res3: add some"),
        (("MODEL.DETR.STUFF_CLASSES", [3]), "ends with 3; it must be below .*, which is 3"),
        (("MODEL.DETR.MASK_POINTS", -1), "MASK_POINTS is -1"),
        (("TEST.MASK_FORMAT", "polygon"), "MASK_FORMAT is 'polygon'; it must be one of 'bool'"),
        (("MODEL.META_ARCHITECTURE", "UpDetr"), "UpDetr: set|INPUT.PATCHES"),
    ],
)
def test_values_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config(*MASKS, *overrides))


def test_frozen_weights_need_masks():
    with pytest.raises(ValueError, match=r"set MODEL\.MASK_ON False"):
        build_model(tiny_config("MODEL.DETR.FROZEN_WEIGHTS", "a.pth"))


@torch.no_grad()
def test_with_focal_loss_detections_have_the_masks_of_their_queries():
    """Detections are pairs of a query and a class, so each query has three, with one mask."""
    made, inputs = mask_model("MODEL.DETR.CLASS_LOSS", "focal").eval(), batch()
    prediction = made.predict(inputs)
    queries = made.read_classes(prediction.logits[-1]).queries
    assert sorted(queries[0].tolist()) == [query for query in range(7) for _ in range(3)]
    for index, output in enumerate(made(inputs)):
        found = output["instances"]
        size = found.image_size
        logits = F.interpolate(prediction.masks[index][None], (48, 56), mode="bilinear")[0]
        expected = (logits[:, : size[0], : size[1]] > 0)[queries[index]]
        assert (found.pred_masks != expected).float().mean() < 1e-4  # rounding near 0
