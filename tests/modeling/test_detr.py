"""The meta-architecture: sizes, invariances, hard inputs."""

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from detectron2.utils.events import EventStorage
from torch import nn

from miti_detr import add_miti_detr_config
from miti_detr.modeling import MitiDetr, SetPrediction
from tests.helpers import ROOT, build_on_meta, tiny_config, training_input

RESIDUALS = ["none", "before_norm", "after_norm"]


@BACKBONE_REGISTRY.register()
class PatchBackbone(Backbone):
    """Non-overlapping convolutions: a cell sees only its own 16 x 16 pixels."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec) -> None:
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 4, 4))
        self._out_features, self._out_feature_channels = ["patches"], {"patches": 8}
        self._out_feature_strides = {"patches": 16}

    def forward(self, x):
        return {"patches": self.convs(x)}


def model(*overrides, seed=0):
    torch.manual_seed(seed)
    return build_model(tiny_config(*overrides))


def config_of(path, *overrides):
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / path))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *overrides])
    return cfg


def trainable(cfg):
    return sum(p.numel() for p in build_on_meta(cfg).parameters() if p.requires_grad)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(("classes", "count"), [(91, 41_302_368), (80, 41_299_541)])
def test_trainable_parameters_of_r50(residual, classes, count):
    overrides = ("MODEL.DETR.NUM_CLASSES", classes, "MODEL.DETR.LAYER_RESIDUAL", residual)
    assert trainable(config_of("Base-DETR.yaml", *overrides)) == count


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("coco/miti_detr_R50_pre_norm_300ep.yaml", 41_302_880),
        ("coco/miti_detr_R50_learned_position_300ep.yaml", 41_315_168),
        ("coco/miti_detr_R101_300ep.yaml", 60_242_272),
    ],
)
def test_trainable_parameters_of_variants(path, count):
    assert trainable(config_of(path, "MODEL.DETR.NUM_CLASSES", 91)) == count


# Below studies/ are comparisons of these, not models
MODEL_CONFIGS = [p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "studies"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    sorted(p.relative_to(ROOT / "configs") for p in MODEL_CONFIGS),
    ids=str,
)
def test_every_config_builds(path):
    cfg = config_of(path)
    made = build_on_meta(cfg)
    assert isinstance(made, MitiDetr)
    name = path.stem
    if name != "Base-DETR" and not name.startswith("Base"):
        is_miti = "miti" in name or path.parent.name == "finetune"
        expected = "before_norm" if is_miti else "none"
        assert made.variant["layer_residual"] == expected
    assert max(cfg.SOLVER.STEPS) < cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_training_step_reaches_every_parameter(residual, pre_norm):
    made = model("MODEL.DETR.LAYER_RESIDUAL", residual, "MODEL.DETR.PRE_NORM", pre_norm)
    inputs = [
        training_input((64, 48), [[4, 5, 30, 40], [20, 20, 44, 60]], [0, 2]),
        training_input((40, 72), [[1, 2, 9, 9]], [1], seed=1),
    ]
    losses = made.train()(inputs)
    assert len(losses) == 3 * 2
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    # Queries are 0 before the first decoder layer, where these have nothing to act on.
    idle = [f"decoder.layers.0.{part}" for part in ("self_attn", "norm1.w", "norm2.w")]
    assert [n for n in without if not any(part in n for part in idle)] == []


@pytest.mark.parametrize("residual", ["before_norm", "after_norm"])
def test_miti_differs_from_detr_on_the_same_weights(residual):
    detr, miti = (
        model("MODEL.DETR.LAYER_RESIDUAL", "none"),
        model("MODEL.DETR.LAYER_RESIDUAL", residual),
    )
    miti.load_state_dict(detr.state_dict(), strict=True)
    inputs = [training_input((64, 96), [], [])]
    difference = detr.eval().predict(inputs).logits - miti.eval().predict(inputs).logits
    assert difference.abs().mean() > 0.01


def test_predict_shapes_and_consistency_with_forward():
    made = model().eval()
    inputs = [training_input((64, 96), [], []), training_input((80, 48), [], [], seed=1)]
    inputs[1].update(height=160, width=96)
    with torch.no_grad():
        prediction, outputs = made.predict(inputs), made(inputs)
    assert isinstance(prediction, SetPrediction)
    assert prediction.logits.shape == (2, 2, 7, 4)
    assert prediction.boxes.shape == (2, 2, 7, 4)
    instances = outputs[1]["instances"]
    assert instances.image_size == (160, 96)
    scores = prediction.logits[-1, 1].softmax(-1)[:, :-1].amax(1)
    torch.testing.assert_close(instances.scores, scores, rtol=0, atol=1e-6)
    cx, _, w, _ = prediction.boxes[-1, 1].unbind(-1)
    x0 = ((cx - w / 2) * 96).clamp(0, 96)
    torch.testing.assert_close(instances.pred_boxes.tensor[:, 0], x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rule", ["ceil", "nearest"])
@pytest.mark.parametrize("position", ["sine", "learned"])
def test_alone_equals_inside_a_padded_batch(rule, position):
    """With a backbone that cannot leak, padding must not change a detection: boxes to 1e-5."""
    made = model(
        *("MODEL.BACKBONE.NAME", "PatchBackbone", "MODEL.DETR.PADDING_MASK", rule),
        *("MODEL.DETR.POSITION_EMBEDDING", position),
    ).eval()
    small = training_input((48, 80), [], [])
    batch = [small, training_input((96, 64), [], [], seed=1), training_input((64, 160), [], [], 2)]
    with torch.no_grad():
        alone, inside = made.predict([small]), made.predict(batch)
    torch.testing.assert_close(inside.boxes[:, :1], alone.boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(inside.logits[:, :1], alone.logits, rtol=0, atol=1e-4)


def test_size_buckets_pad_to_a_multiple():
    images = model("MODEL.DETR.SIZE_DIVISIBILITY", 64).preprocess_image(
        [training_input((65, 30), [], [])]
    )
    assert images.tensor.shape == (1, 3, 128, 64)
    assert images.image_sizes == [(65, 30)]
    assert not images.tensor[:, :, 65:].any()
    unpadded = model().preprocess_image([training_input((65, 30), [], [])])
    assert unpadded.tensor.shape == (1, 3, 65, 30)


HARD = {
    "nothing in the batch": [((48, 48), [], []), ((32, 64), [], [])],
    "one empty image": [((48, 48), [], []), ((32, 64), [[1, 1, 20, 20]], [1])],
    "more objects than queries": [((48, 48), [[i, i, i + 9, i + 9] for i in range(30)], [0] * 30)],
    "one pixel wide": [((48, 48), [[5, 0, 6, 48], [7, 7, 8, 8]], [0, 1])],
    "20 x 2000 pixels": [((20, 2000), [[5, 2, 1500, 18]], [2])],
}


@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_have_finite_losses_gradients_and_detections(case):
    made = model().train()
    inputs = [training_input(*arguments, seed=i) for i, arguments in enumerate(HARD[case])]
    with EventStorage() as storage:
        losses = made(inputs)
        assert "diag/class_error" in storage.latest()
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)
    with torch.no_grad():
        assert len(made.eval()(inputs)) == len(inputs)


def test_weighted_losses_alone_are_returned():
    """Doubling every weight doubles the sum, so nothing unweighted is in the dictionary."""
    inputs = [training_input((48, 48), [[1, 1, 20, 20]], [1])]
    doubled = [("CLASS_WEIGHT", 2.0), ("L1_WEIGHT", 10.0), ("GIOU_WEIGHT", 4.0)]
    overrides = [x for key, value in doubled for x in (f"MODEL.DETR.{key}", value)]
    once, twice = model()(inputs), model(*overrides)(inputs)
    torch.testing.assert_close(sum(twice.values()), 2 * sum(once.values()), rtol=1e-5, atol=0)


def test_float64_model_runs():
    made = model().double().eval()
    assert made.predict([training_input((48, 48), [], [])]).logits.dtype == torch.float64


def test_autocast_keeps_boxes_and_losses_in_float32():
    made = model().train()
    inputs = [training_input((48, 48), [[1, 1, 20, 20]], [1])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = made(inputs)
        assert made.predict(inputs).boxes.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_multiplier_zero_freezes_the_backbone():
    made = model("SOLVER.BACKBONE_MULTIPLIER", 0.0)
    assert not any(p.requires_grad for p in made.backbone.parameters())
    assert all(p.requires_grad for p in made.transformer.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.DETR.FROZEN_WEIGHTS", "a.pth"), "set MODEL.MASK_ON False"),
        (("MODEL.DETR.LAYER_RESIDUAL", "both"), "MODEL.DETR.LAYER_RESIDUAL"),
        (("MODEL.DETR.POSITION_EMBEDDING", "v3"), "one of 'sine', 'learned'"),
    ],
)
def test_bad_config_values_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        model(*overrides)


def test_bad_training_inputs_are_named():
    made = model().train()
    with pytest.raises(ValueError, match=r"indices 1..5, the model has classes 0..2.*NUM_CLASSES"):
        made([training_input((48, 48), [[1, 1, 9, 9], [1, 1, 5, 5]], [1, 5])])
    inputs = training_input((48, 48), [], [])
    del inputs["instances"]
    with pytest.raises(ValueError, match="need 'instances'"):
        made([inputs])
