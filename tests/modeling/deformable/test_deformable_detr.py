"""Deformable-DETR against the published model, its sizes, and its variants."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from miti_detr.checkpoint import convert_state_dict, to_official
from miti_detr.modeling.deformable import Pyramid
from miti_detr.modeling.deformable.boxes import embed_boxes, token_boxes
from miti_detr.modeling.postprocess import detections
from tests.fill import filled, image
from tests.helpers import build_on_meta, load_golden, training_input

from .helpers import KINDS, coco_config, filled_once, tiny

GOLDEN = load_golden("deformable")
IMAGES = [{"image": image(f"image:{i}", h, w)} for i, (h, w) in enumerate([(160, 224), (192, 128)])]
INPUTS = [
    training_input((64, 96), [[4, 5, 30, 40], [20, 20, 44, 60]], [0, 2]),
    training_input((80, 72), [[1, 2, 9, 9]], [1], seed=1),
]


def golden_model(*overrides):
    """The published base model of the goldens, in float64."""
    cfg = coco_config(
        "base",
        *("MODEL.DETR.HIDDEN_DIM", 64, "MODEL.DETR.NHEADS", 4, "MODEL.DETR.DIM_FEEDFORWARD", 128),
        *("MODEL.DETR.ENC_LAYERS", 2, "MODEL.DETR.DEC_LAYERS", 3),
        *("MODEL.DETR.NUM_OBJECT_QUERIES", 30, "MODEL.DETR.NUM_CLASSES", 91),
        *("MODEL.DETR.PADDING_MASK", "nearest", "MODEL.DETR.DROPOUT", 0.0),
        *overrides,
    )
    model = build_model(cfg)
    official = filled_once(to_official(model.state_dict(), num_classes=91))
    state, _ = convert_state_dict(official, num_classes=91)
    model.load_state_dict(state, strict=True)
    return model.double()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "accelerated"])
def golden(request):
    model = golden_model("MODEL.ACCELERATE", request.param)
    with torch.no_grad():
        return model, model.eval().predict(IMAGES)


def targets():
    return [
        {"labels": GOLDEN["in.labels0"], "boxes": GOLDEN["in.boxes0"].double()},
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4).double()},
    ]


@pytest.mark.slow
def test_base_model_equals_published(golden):
    _, prediction = golden
    expected = GOLDEN["base.logits_every3"].double()
    torch.testing.assert_close(prediction.logits[:, :, ::3], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction.boxes, GOLDEN["base.boxes"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_losses_equal_published(golden):
    model, prediction = golden
    with EventStorage() as storage:
        losses = model.criterion(prediction.logits, prediction.boxes, targets())
        logged = {key: value for key, (value, _) in storage.latest().items()}
    weights = {"ce": 2.0, "bbox": 5.0, "giou": 2.0}
    for name, value in zip(
        GOLDEN["base.loss_names"].tolist(), GOLDEN["base.loss_values"], strict=True
    ):
        if name.startswith("loss"):
            weight = weights[name.split("_")[1]]
            torch.testing.assert_close(losses[name], weight * value, rtol=1e-5, atol=0)
        else:
            assert logged[f"diag/{name}"] == pytest.approx(float(value), abs=1e-4)
    assert len(losses) == 9
    torch.testing.assert_close(sum(losses.values()), GOLDEN["base.total"], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_matching_and_detections_equal_published(golden):
    model, prediction = golden
    logits, boxes = prediction.logits[-1:], prediction.boxes[-1:]
    cost = model.criterion.matcher.costs(logits, boxes, targets())[0, 0]
    torch.testing.assert_close(cost, GOLDEN["base.cost0"], rtol=1e-5, atol=1e-5)
    query, target = model.criterion.matcher(logits[0], boxes[0], targets())[0]
    torch.testing.assert_close(query, GOLDEN["base.pred_index0"], rtol=0, atol=0)
    torch.testing.assert_close(target, GOLDEN["base.target_index0"], rtol=0, atol=0)
    found = detections(logits[0], boxes[0], [(480, 640), (333, 500)], model.read_classes)
    scores = torch.stack([result.scores for result in found])
    expected = GOLDEN["base.post.scores"].sort(descending=True).values.float()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert [len(result) for result in found] == [100, 100]


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("single_scale", 33_844_193),
        ("base", 39_847_265),
        ("refine", 40_627_260),
        ("two_stage", 40_959_129),
    ],
)
@pytest.mark.parametrize("name", ["deformable_detr", "miti_deformable_detr"])
def test_trainable_parameters_equal_published(name, kind, count):
    model = build_on_meta(coco_config(kind, "MODEL.DETR.NUM_CLASSES", 91, name=name))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("residual", ["none", "before_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_step_reaches_every_parameter(kind, residual):
    model = build_model(tiny(kind, "MODEL.DETR.LAYER_RESIDUAL", residual))
    model.load_state_dict(filled(model.state_dict()))
    losses = model.train()(INPUTS)
    assert len(losses) == 3 * (3 if kind == "two_stage" else 2)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("kind", KINDS)
def test_detections(kind):
    """TEST.DETECTIONS_PER_IMAGE pairs of query and class, in decreasing order of score."""
    model = build_model(tiny(kind)).eval()
    with torch.no_grad():
        prediction, outputs = model.predict(INPUTS), model(INPUTS)
    assert prediction.logits.shape == (2, 2, 7, 3)
    assert prediction.boxes.shape == (2, 2, 7, 4)
    for output, logits in zip(outputs, prediction.logits[-1], strict=True):
        scores = output["instances"].scores
        expected = logits.sigmoid().flatten().topk(5).values[: len(scores)]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_residual_of_each_stack_acts(stack):
    states = {}
    for residual_in in ("none", stack, "both"):
        residual = "none" if residual_in == "none" else "before_norm"
        overrides = ("MODEL.DETR.LAYER_RESIDUAL", residual)
        if residual != "none":
            overrides += ("MODEL.DETR.LAYER_RESIDUAL_IN", residual_in)
        model = build_model(tiny("base", *overrides)).eval()
        model.load_state_dict(filled(model.state_dict()))
        with torch.no_grad():
            states[residual_in] = model.predict(INPUTS).logits
    for other in ("none", "both"):
        assert (states[stack] - states[other]).abs().mean() > 0.01


def test_strength_zero_is_the_published_model():
    plain = build_model(tiny("base", "MODEL.DETR.LAYER_RESIDUAL", "none")).eval()
    miti = build_model(tiny("base", "MODEL.DETR.LAYER_RESIDUAL", "before_norm")).eval()
    miti.load_state_dict(dict(plain.state_dict()))
    miti.residual_strength = 0.0
    with torch.no_grad():
        expected, result = plain.predict(INPUTS), miti.predict(INPUTS)
    torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-6)


def test_first_decoder_layer_has_something_to_carry():
    """Unlike in DETR, whose queries start from zero."""
    model = build_model(tiny("base", "MODEL.DETR.DEC_LAYERS", 1)).eval()
    model.load_state_dict(filled(model.state_dict()))
    with torch.no_grad():
        full = model.predict(INPUTS).logits
        for layer in model.transformer.decoder.layers:
            layer.residual.strength = 0.0
        assert (model.predict(INPUTS).logits - full).abs().mean() > 0.01


@pytest.mark.parametrize("rule", ["ceil", "nearest"])
@pytest.mark.parametrize("kind", ["base", "two_stage"])
def test_padding_does_not_change_a_detection(kind, rule):
    """A padded copy of the tokens of one image, masked: boxes to 1e-5."""
    model = build_model(tiny(kind, "MODEL.DETR.PADDING_MASK", rule)).eval()
    model.load_state_dict(filled(model.state_dict()))
    masks = [torch.zeros(1, h, w, dtype=torch.bool) for h, w in ((8, 12), (4, 6), (2, 3))]
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(1, 64, *m.shape[1:], generator=generator) for m in masks]
    found = []
    for pad in (0, 1):
        mask, tokens, positions = [], [], []
        for m, x in zip(masks, levels, strict=True):
            more = pad * m.shape[1] // 2
            m, x = (
                torch.nn.functional.pad(t, (0, more, 0, more), value=v)
                for t, v in ((m, True), (x, 9.0))
            )
            mask.append(m)
            tokens.append(x.flatten(2).transpose(1, 2))
            positions.append(model.position_encoding(m).flatten(2).transpose(1, 2))
        embed = None if kind == "two_stage" else model.query_embed.weight
        with torch.no_grad():
            states = model.transformer(
                torch.cat(tokens, 1),
                torch.cat(positions, 1),
                Pyramid.from_masks(mask, torch.device("cpu")),
                embed,
                model.class_embed,
                model.bbox_embed,
            )
        found.append(states.boxes)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_token_boxes_leave_out_border_and_padding():
    """Centres of a row of 50: (i + 0.5) / 50, of which 0.01 and 0.99 are not inside."""
    mask = torch.zeros(2, 50, 60, dtype=torch.bool)
    mask[1, :, 50:] = True
    logits, valid = token_boxes(Pyramid.from_masks([mask], torch.device("cpu")))
    rows = valid.view(2, 50, 60)
    assert not rows[:, [0, -1]].any()
    assert rows[1, 1:-1, 1:49].all()
    assert not rows[1, :, 49:].any()
    assert (logits[~valid] == torch.inf).all()
    box = logits.view(2, 50, 60, 4)[1, 10, 20].sigmoid()
    torch.testing.assert_close(box, torch.tensor([0.41, 0.21, 0.05, 0.05]), rtol=0, atol=1e-6)


def test_embedding_of_boxes():
    """sin(2 pi x / 1) and cos(2 pi x / 1) first, then of longer waves."""
    result = embed_boxes(torch.tensor([[[0.25, 0.0, 0.5, 1.0]]]), 8)[0, 0].view(4, 4)
    torch.testing.assert_close(result[0, :2], torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)
    expected = torch.tensor([0.25, 0.0, 0.5, 1.0]) * 2 * torch.pi / 100
    torch.testing.assert_close(result[:, 2], expected.sin(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.CUDA_GRAPHS", True), r"MODEL.CUDA_GRAPHS is True; DeformableDetr has none"),
        (("MODEL.DETR.PRE_NORM", True), r"PRE_NORM is True; DeformableDetr is post-norm"),
        (
            ("MODEL.DETR.LAYER_RESIDUAL", "after_norm"),
            r"LAYER_RESIDUAL is 'after_norm'; .*sampling offsets.*use none or before_norm",
        ),
        (("MODEL.DETR.HIDDEN_DIM", 48), r"HIDDEN_DIM is 48; .*a multiple of 32"),
        (("MODEL.DETR.TWO_STAGE", True), r"TWO_STAGE is True; set MODEL.DETR.BOX_REFINEMENT True"),
        (("MODEL.DETR.NUM_FEATURE_LEVELS", 1), r"NUM_FEATURE_LEVELS is 1; each of .*IN_FEATURES"),
        (("MODEL.META_ARCHITECTURE", "MitiDetr"), r"NUM_FEATURE_LEVELS is 3; set MODEL.META_ARCH"),
    ],
)
def test_impossible_configs_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny("base", *overrides))
