"""UP-DETR: groups of queries, patches in queries, feature reconstruction."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from miti_detr.data.patches import PATCH_CLASS as CLASS_IN_DATA
from miti_detr.modeling.pretrain import PATCH_CLASS, group_mask
from miti_detr.modeling.pretrain.up_detr import feature_losses
from tests.helpers import tiny_config, training_input
from tests.modeling.backbones.test_backbones import FPN_KEYS
from tests.modeling.test_detr import config_of, trainable

COUNTS = [(12, 3), (12, 6), (100, 20)]  # queries and patches


def model(queries, patches, *overrides):
    """A small UpDetr whose patches weigh much: at random weights their trace would be faint."""
    cfg = tiny_config(
        *("MODEL.META_ARCHITECTURE", "UpDetr", "MODEL.DETR.NUM_CLASSES", 2),
        *("MODEL.DETR.NUM_OBJECT_QUERIES", queries, "INPUT.PATCHES.NUMBER", patches),
        *overrides,
    )
    torch.manual_seed(0)
    made = build_model(cfg)
    made.patch2query.weight.data.mul_(30)
    made.patch_dropout = 0.0
    return made


def item(patches, size=(64, 96), seed=0):
    """An image with random patches; their boxes lie on a diagonal."""
    boxes = [[2 * i, i, 2 * i + 20, i + 12] for i in range(patches)]
    made = training_input(size, boxes, [PATCH_CLASS] * patches, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    made["patches"] = torch.randint(
        0, 256, (patches, 3, 32, 32), dtype=torch.uint8, generator=generator
    )
    return made


def test_trainable_parameters():
    """Pre-training with the CNN frozen; fine-tuning (91 classes) is DETR's and one LayerNorm.

    DETR R50 41,302,368 + 2 * 256 = 41,302,880.
    """
    assert trainable(config_of("pretrain/up_detr_R50_imagenet_60ep.yaml")) == 19_164_167
    fine_tuning = ("MODEL.DETR.NUM_CLASSES", 91)
    assert trainable(config_of("coco/up_detr_R50_300ep.yaml", *fine_tuning)) == 41_302_880


def test_patches_are_the_same_class_in_data_and_model():
    assert CLASS_IN_DATA == PATCH_CLASS


@pytest.mark.parametrize(("queries", "patches"), COUNTS)
def test_group_mask(queries, patches):
    """Entry (i, j) is floor(i / G) = floor(j / G), with G queries of each patch."""
    group = queries // patches
    expected = [[i // group == j // group for j in range(queries)] for i in range(queries)]
    mask = group_mask(patches, group)
    assert mask.tolist() == expected
    assert (mask.sum(1) == group).all()  # no row without a query, which would be NaN


@pytest.mark.parametrize(("queries", "patches"), COUNTS)
@pytest.mark.parametrize("residual", ["none", "before_norm", "after_norm"])
def test_queries_of_a_patch_do_not_see_other_patches(queries, patches, residual):
    """Their prediction is the same beside other patches, and with only the patches before it."""
    made = model(queries, patches, "MODEL.DETR.LAYER_RESIDUAL", residual).eval()
    group = queries // patches
    one, other = item(patches), item(patches)
    other["patches"][1:] = 255 - other["patches"][1:]
    few = {**one, "patches": one["patches"][:2]}
    with torch.no_grad():
        a, b, c = (made.predict([x]) for x in (one, other, few))
    assert a.logits.isfinite().all()
    torch.testing.assert_close(a.boxes[:, :, :group], b.boxes[:, :, :group], rtol=0, atol=1e-6)
    assert (a.boxes[:, :, group:] - b.boxes[:, :, group:]).abs().amax(-1).min() > 1e-5
    assert c.boxes.shape[2] == 2 * group
    torch.testing.assert_close(a.boxes[:, :, : 2 * group], c.boxes, rtol=0, atol=1e-6)


def test_all_queries_see_each_other_without_the_mask():
    """The test before would pass if queries had no self-attention at all."""
    made = model(12, 3).eval()
    made.query_mask.fill_(True)
    one, other = item(3), item(3)
    other["patches"][1:] = 255 - other["patches"][1:]
    with torch.no_grad():
        a, b = (made.predict([x]).boxes[:, :, :4] for x in (one, other))
    assert (a - b).abs().max() > 1e-4


def test_queries_are_the_sum_of_embedding_and_projected_patch():
    made = model(12, 3).eval()
    inputs = [item(3), item(3, seed=1)]
    queries = made.embed_queries(inputs)
    for n, x in enumerate(inputs):
        for q in range(12):
            pixels = (x["patches"][q // 4].float() - made.pixel_mean) / made.pixel_std
            feature = made.backbone.body(pixels[None])["res3"].mean((2, 3))[0]
            torch.testing.assert_close(
                queries.patch_features[n, q // 4], feature, rtol=0, atol=1e-5
            )
            expected = made.query_embed.weight[q] + made.patch2query(feature)
            torch.testing.assert_close(queries.embed[n, q], expected, rtol=1e-5, atol=1e-5)


def test_shuffle_moves_the_embeddings_alone():
    """In training: the same order for all images, another one each time; patches stay."""
    made = model(12, 3, "MODEL.RESNETS.NORM", "FrozenBN")
    made.query_shuffle = True
    inputs = [item(3), item(3, seed=1)]
    plain = made.eval().embed_queries(inputs)
    patches = plain.embed - made.query_embed.weight
    orders = []
    for _ in range(2):
        shuffled = made.train().embed_queries(inputs)
        embeddings = shuffled.embed - patches
        torch.testing.assert_close(embeddings[0], embeddings[1], rtol=0, atol=1e-5)
        distance = torch.cdist(embeddings[0], made.query_embed.weight)
        assert distance.amin(1).max() < 1e-4
        orders.append(distance.argmin(1).tolist())
        assert sorted(orders[-1]) == list(range(12))
        assert torch.equal(shuffled.mask, plain.mask)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_leaves_a_share_of_the_queries_without_patch(p):
    """Of n = 2 * 500 queries n p, within 4 standard deviations sqrt(n p (1 - p)); none in eval."""
    made = model(500, 5, "MODEL.RESNETS.NORM", "FrozenBN")
    made.patch_dropout = p
    inputs = [item(5), item(5, seed=1)]
    whole = made.eval().embed_queries(inputs).embed
    dropped = made.train().embed_queries(inputs).embed
    bare = (dropped == made.query_embed.weight).all(-1)
    assert abs(bare.sum().item() - 1000 * p) < 4 * math.sqrt(1000 * p * (1 - p))
    torch.testing.assert_close(dropped[~bare], whole[~bare], rtol=0, atol=1e-6)
    assert not torch.equal(bare[0], bare[1])  # each query of each image by itself
    assert not (whole == made.query_embed.weight).all(-1).any()


def test_feature_loss():
    """|a/|a| - b/|b||^2 = 2 - 2 cos: 0, 2 and 4 for equal, perpendicular, opposite directions."""
    a = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]]])
    b = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    for k, expected in enumerate((0.0, 2.0, 4.0)):
        loss = feature_losses(a[:, k : k + 1], b[:, k : k + 1], torch.tensor(1.0))
        torch.testing.assert_close(loss, torch.tensor([expected]), rtol=0, atol=1e-6)
    total = feature_losses(a, b, torch.tensor(2.0))
    torch.testing.assert_close(total, torch.tensor([3.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("deep", [True, False])
def test_losses_equal_the_published_way(deep):
    """As published: reconstruct for all queries, then pick the matched ones, layer by layer."""
    made = model(12, 3, "MODEL.DETR.DEEP_SUPERVISION", deep, "MODEL.RESNETS.NORM", "FrozenBN")
    inputs = [item(3), item(3, (48, 64), seed=1)]
    made.train()
    prediction = made.predict(inputs)
    losses = made.losses(prediction, inputs)
    targets = made.targets(inputs, torch.float32)
    plain = made.criterion(prediction.logits, prediction.boxes, targets)
    assert len(losses) == (8 if deep else 4)
    for layer, suffix in ((0, "_0"), (1, ""))[0 if deep else 1 :]:
        features = F.normalize(made.feature_align(prediction.states[layer]), dim=-1)
        matches = made.criterion.matcher(prediction.logits[layer], prediction.boxes[layer], targets)
        total = torch.zeros(())
        for n, (query, target) in enumerate(matches):
            wanted = F.normalize(prediction.patch_features[n][target], dim=-1)
            total = total + (features[n][query] - wanted).square().sum()
        torch.testing.assert_close(losses["loss_feature" + suffix], total / 6)
        for name in ("loss_ce", "loss_bbox", "loss_giou"):
            torch.testing.assert_close(losses[name + suffix], plain[name + suffix])


@pytest.mark.parametrize(("queries", "patches"), COUNTS)
def test_a_patch_can_be_matched_with_its_own_queries_alone(queries, patches):
    """The best query of another patch is no match; of its own ones, the best is."""
    group, targets = queries // patches, [{"labels": torch.ones(patches, dtype=torch.int64)}]
    targets[0]["boxes"] = torch.linspace(0.2, 0.8, patches)[:, None].expand(-1, 4)
    logits = torch.zeros(1, 1, queries, 3)
    # The last query of each patch says where the next patch is, the first one is a little off.
    boxes = torch.full((1, 1, queries, 4), 0.95)
    boxes[0, 0, group - 1 :: group] = targets[0]["boxes"].roll(-1, 0)
    boxes[0, 0, ::group] = targets[0]["boxes"] + 0.01
    for own in (False, True):
        matcher = model(queries, patches, "MODEL.UP_DETR.MATCH_OWN", own).criterion.matcher
        _, _, query, patch = matcher.match_layers(logits, boxes, targets)
        assert (query // group).tolist() == sorted((query // group).tolist())
        assert torch.equal(query // group, patch) == own
        if own:
            assert (query % group == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("residual", ["none", "before_norm", "after_norm"])
def test_training_step_reaches_every_parameter(residual, pre_norm):
    made = model(
        12, 3, "MODEL.DETR.LAYER_RESIDUAL", residual, "MODEL.DETR.PRE_NORM", pre_norm
    ).train()
    with EventStorage():
        sum(made([item(3), item(3, (40, 72), seed=1)]).values()).backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    # Queries are 0 before the first decoder layer, where these have nothing to act on.
    idle = [f"decoder.layers.0.{part}" for part in ("self_attn", "norm1.w", "norm2.w")]
    assert [n for n in without if not any(part in n for part in idle)] == []


def test_alone_equals_inside_a_padded_batch():
    """With a backbone that cannot leak, padding must not change a detection: boxes to 1e-5."""
    made = model(12, 6, "MODEL.BACKBONE.NAME", "PatchBackbone").eval()
    batch = [item(6, (48, 80)), item(6, (96, 64), 1), item(6, (64, 160), 2)]
    with torch.no_grad():
        alone, inside = made.predict(batch[:1]), made.predict(batch)
    torch.testing.assert_close(inside.boxes[:, :1], alone.boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(inside.logits[:, :1], alone.logits, rtol=0, atol=1e-4)


def test_detections_name_their_patch():
    made = model(12, 3).eval()
    with torch.no_grad():
        instances = made([item(3)])[0]["instances"]
    assert instances.pred_patches.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_without_feature_reconstruction_there_is_no_head():
    made = model(12, 3, "MODEL.UP_DETR.FEATURE_WEIGHT", 0.0)
    assert not any("feature_align" in key for key in made.state_dict())
    losses = made.train()([item(3)])
    assert not any("feature" in name for name in losses)


@pytest.mark.slow
def test_patches_pass_through_a_feature_pyramid():
    made = model(12, 3, *FPN_KEYS).train()
    assert all(torch.isfinite(loss) for loss in made([item(3)]).values())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([training_input((64, 64), [[0, 0, 9, 9]], [1])], "image0.png has no 'patches'"),
        ([item(2), item(3)], r"have \[2, 3\] patches; needed: the same number"),
        ([item(4)], r"have \[4\] patches; .* at most 3"),
        ([{**item(3), "instances": item(2)["instances"]}], "3 patches need 'instances' of one box"),
    ],
)
def test_inputs_that_do_not_fit(inputs, message):
    with pytest.raises(ValueError, match=message):
        model(12, 3).train()(inputs)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("INPUT.PATCHES.NUMBER", 5), "INPUT.PATCHES.NUMBER is 5; .* a divisor of .*QUERIES 12"),
        (("MODEL.DETR.NUM_CLASSES", 3), "NUM_CLASSES is 3; .* set it to 2"),
    ],
)
def test_values_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        model(12, 3, *overrides)
