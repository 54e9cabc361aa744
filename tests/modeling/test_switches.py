"""Every speed switch against the plain path: folded, recomputed, compiled, lower precision."""

import logging
import shutil

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.accelerate import checkpoint_activations
from miti_detr.accelerate.execution import BACKBONE_BLOCKS
from miti_detr.modeling.transformer import LayerResidual, TransformerLayer
from tests.fill import filled
from tests.helpers import load_golden, saved_for_backward, tiny_config, training_input
from tests.modeling.backbones.test_backbones import FPN_KEYS, SWIN, VIT
from tests.modeling.test_transformer import assert_equals_golden, transformer

FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN")
PLAIN = (*FROZEN, "MODEL.ACCELERATE", False)
RECOMPUTED = (*FROZEN, "MODEL.DETR.ACTIVATION_CHECKPOINT", True)
COMPILED = (*FROZEN, "MODEL.COMPILE", True)
BFLOAT16 = (*FROZEN, "TEST.AMP.ENABLED", True)
# As little as possible to compile
SHALLOW = (
    *("MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1),
    *("MODEL.RESNETS.OUT_FEATURES", ["res2"]),
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
MODES = [
    pytest.param(FROZEN, id="folded"),
    pytest.param(RECOMPUTED, id="recomputed"),
    pytest.param(COMPILED, id="compiled", marks=needs_compiler),
]
INPUTS = [
    training_input((64, 48), [[4, 5, 30, 40], [20, 20, 44, 60]], [0, 2]),
    training_input((40, 72), [[1, 2, 9, 9]], [1], seed=1),
]


def model(*overrides):
    """Of the same weights, whatever the switches are."""
    made = build_model(tiny_config("MODEL.DETR.DEC_LAYERS", 2, *overrides))
    made.load_state_dict(filled(made.state_dict()))
    return made


def step(made, seed=0):
    """Losses and gradients of a training step."""
    torch.manual_seed(seed)
    losses = made.train()(INPUTS)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


def compare_steps(one, other, rtol):
    """Losses to ``rtol``, each gradient to ``rtol`` of its largest value."""
    (losses, gradients), (expected_losses, expected) = step(one), step(other)
    torch.testing.assert_close(losses, expected_losses, rtol=rtol, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = rtol * float(gradient.abs().max()) + 1e-12
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("overrides", [FROZEN, RECOMPUTED], ids=["folded", "recomputed"])
def test_prediction_equals_the_plain_path(overrides):
    """Padded and unpadded batches: logits to 1e-4, boxes to 1e-5."""
    plain, made = model(*PLAIN).eval(), model(*overrides).eval()
    for inputs in (INPUTS, INPUTS[:1]):
        with torch.no_grad():
            result, expected = made.predict(inputs), plain.predict(inputs)
        torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(result.boxes, expected.boxes, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", MODES)
def test_training_step_equals_the_plain_path(overrides):
    """In float64: in float32 an activation near 0 may fall to the other side."""
    made, plain = (model(*switches, *SHALLOW).double() for switches in (overrides, PLAIN))
    compare_steps(made, plain, rtol=1e-8)


def test_recomputing_with_dropout_draws_the_same_numbers():
    dropout = ("MODEL.DETR.DROPOUT", 0.3)
    compare_steps(model(*RECOMPUTED, *dropout), model(*FROZEN, *dropout), rtol=1e-6)


def test_recomputing_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        compare_steps(model(*RECOMPUTED), model(*FROZEN), rtol=1e-6)


def kept_bytes(made):
    """Bytes that autograd keeps between the two passes, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in made.parameters()}
    with saved_for_backward() as saved:
        losses = made.train()(INPUTS)
    assert len(losses) == 6
    others = (t for pointer, t in saved.items() if pointer not in parameters)
    return sum(t.untyped_storage().nbytes() for t in others)


def test_recomputing_keeps_less():
    assert kept_bytes(model(*RECOMPUTED)) < 0.5 * kept_bytes(model(*FROZEN))


@pytest.mark.parametrize("parts", [("backbone.res3",), ("backbone.stem", "transformer.encoder")])
def test_recomputing_in_parts_equals_the_plain_path(parts):
    """In float64, with frozen batch norms, folded; gradients to 1e-8."""
    in_parts = (*RECOMPUTED, "MODEL.DETR.ACTIVATION_CHECKPOINT_IN", parts)
    made, plain = (model(*switches).double() for switches in (in_parts, PLAIN))
    compare_steps(made, plain, rtol=1e-8)


def test_recomputing_in_parts_keeps_less_there():
    """Both parts together keep as little as each by itself saves."""
    key = "MODEL.DETR.ACTIVATION_CHECKPOINT_IN"
    all_kept, none_kept = kept_bytes(model(*FROZEN)), kept_bytes(model(*RECOMPUTED))
    for part, other in (("backbone", "transformer"), ("transformer", "backbone")):
        kept, rest = (kept_bytes(model(*RECOMPUTED, key, (name,))) for name in (part, other))
        assert none_kept < kept < all_kept
        assert kept + rest == pytest.approx(all_kept + none_kept, rel=0.02)


@pytest.mark.parametrize(
    ("part", "count"),
    [("backbone.res2", 2), ("backbone.stem", 1), ("transformer.decoder", 2), ("backbone", 5)],
)
def test_parts_of_a_backbone_are_named_without_their_wrapper(part, count):
    kinds = (TransformerLayer, *BACKBONE_BLOCKS)
    assert checkpoint_activations(model(*FROZEN), kinds, (part,)) == (count, 0)


@pytest.mark.parametrize("part", ["backbone.res9", "head", "backbone.res"])
def test_parts_without_layers_to_recompute_are_named(part):
    message = f"ACTIVATION_CHECKPOINT_IN has '{part}'.*backbone.res2, .*transformer.encoder, "
    with pytest.raises(ValueError, match=message):
        model(*RECOMPUTED, "MODEL.DETR.ACTIVATION_CHECKPOINT_IN", (part,))


def test_networks_of_timm_are_left_out(caplog):
    pytest.importorskip("timm")
    network = ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet18")
    with caplog.at_level(logging.INFO, "miti_detr"):
        model(*network, "MODEL.DETR.ACTIVATION_CHECKPOINT", True)
    assert "ACTIVATION_CHECKPOINT leaves out the backbone: only the blocks of" in caplog.text
    assert "4 layers and blocks are computed twice (backbone, transformer)" in caplog.text


def test_recomputing_leaves_keys_classes_and_evaluation_alone():
    plain, made = model(*FROZEN), model(*RECOMPUTED)
    assert list(made.state_dict()) == list(plain.state_dict())
    assert isinstance(made.transformer.encoder.layers[0], type(plain.transformer.encoder.layers[0]))
    with torch.no_grad():
        result, expected = made.eval().predict(INPUTS), plain.eval().predict(INPUTS)
    torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        pytest.param((), 1 + 4, id="ResNet to res3"),
        pytest.param(FPN_KEYS, 1 + 8, id="FPN"),
        pytest.param(SWIN, 8, id="Swin"),
        pytest.param(VIT, 12, id="ViT"),
    ],
)
def test_which_layers_are_recomputed(overrides, count):
    """Stem and blocks of the backbone, two encoder and two decoder layers: the same step."""
    made, plain = model(*FROZEN, *overrides), model(*FROZEN, *overrides)
    assert checkpoint_activations(made, (TransformerLayer, *BACKBONE_BLOCKS)) == (count + 4, 0)
    compare_steps(made, plain, rtol=1e-5)


def test_blocks_that_count_batches_are_left_alone(caplog):
    model("MODEL.RESNETS.NORM", "BN", "MODEL.DETR.ACTIVATION_CHECKPOINT", True)
    assert "leaves out" in caplog.text
    assert "MODEL.RESNETS.NORM FrozenBN" in caplog.text


def test_bfloat16_in_evaluation_mode_alone():
    """Near the float32 prediction, which training and other configs keep."""
    exact, made = model(*FROZEN), model(*BFLOAT16)
    with torch.no_grad():
        expected = exact.eval().predict(INPUTS)
        result = made.eval().predict(INPUTS)
        instances = made(INPUTS)[0]["instances"]
        assert made.train().predict(INPUTS).logits.dtype == torch.float32
    assert result.logits.dtype == torch.bfloat16
    assert result.boxes.dtype == instances.scores.dtype == torch.float32
    assert instances.pred_boxes.tensor.dtype == torch.float32
    torch.testing.assert_close(result.logits.float(), expected.logits, rtol=0, atol=0.2)
    torch.testing.assert_close(result.boxes, expected.boxes, rtol=0, atol=0.02)
    assert (result.boxes - expected.boxes).abs().max() > 0


def test_without_the_key_the_callers_autocast_counts():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(*FROZEN).eval().predict(INPUTS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("SOLVER.AMP.PRECISION", "int8"),
            "SOLVER.AMP.PRECISION is 'int8'; it must be one of 'float16', 'bfloat16'",
        ),
        (
            ("TEST.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"),
            "SOLVER.AMP.PRECISION is 'float16', which needs a GPU; on a CPU set it to bfloat16",
        ),
    ],
)
def test_bad_precisions_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        model(*overrides)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"MODEL\.COMPILE .* no-such-compiler was not found"):
        model(*COMPILED)


@needs_compiler
def test_compiled_weights_load_anywhere():
    made, plain = model(*COMPILED), model(*FROZEN)
    assert list(made.state_dict()) == list(plain.state_dict())
    assert made.eval().load_state_dict(plain.state_dict()).missing_keys == []


GOLDEN = load_golden("transformer")


def run_golden(made, dtype=torch.float32):
    src, embed, pos = (GOLDEN[f"in.{name}"].to(dtype) for name in ("src", "query_embed", "pos"))
    with torch.set_grad_enabled(made.training):
        states, memory = made(src, GOLDEN["in.mask"], embed, pos)
    return states.detach(), memory.detach()


def golden_transformer():
    made = transformer(d_model=64, dim_feedforward=128, layer_residual="before_norm", dropout=0.0)
    made.load_state_dict(filled(made.state_dict(), "transformer."))
    return made


def test_recomputed_transformer_equals_published():
    made = golden_transformer().double().train()
    assert checkpoint_activations(made, (TransformerLayer, *BACKBONE_BLOCKS)) == (6, 0)
    states, memory = run_golden(made, torch.float64)
    assert_equals_golden(states, GOLDEN["before_norm.post.hs"], torch.float64)
    assert_equals_golden(memory, GOLDEN["before_norm.post.memory"], torch.float64)


@pytest.mark.slow
def test_a_rising_residual_is_compiled_once():
    """One graph for all strengths below 1 (seen without generating code), each with its result."""
    made, eager = golden_transformer(), golden_transformer()
    made.compile(backend="eager")

    def run(model, strength):
        for layer in model.modules():
            if isinstance(layer, LayerResidual):
                layer.strength = strength
        return run_golden(model)[0]

    run(made, 0.25)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for strength in (0.5, 0.75):
            torch.testing.assert_close(run(made, strength), run(eager, strength), rtol=0, atol=0)
    assert (run(eager, 0.5) - run(eager, 0.75)).abs().max() > 1e-3
    assert_equals_golden(run(made, 1.0), GOLDEN["before_norm.post.hs"], torch.float32)


@pytest.mark.slow
def test_shapes_after_the_second_are_compiled_for_already():
    """Height, width and number of images become symbols (seen without generating code)."""
    made, eager = model(*FROZEN).eval(), model(*FROZEN).eval()
    for part in (made.backbone.body, made.transformer):
        part.compile(backend="eager")

    def check(*sizes):
        inputs = [training_input(size, [], [], seed=i) for i, size in enumerate(sizes)]
        with torch.no_grad():
            result, expected = made.predict(inputs), eager.predict(inputs)
        torch.testing.assert_close(result.boxes, expected.boxes, rtol=0, atol=1e-6)

    check((64, 48), (40, 72))
    check((96, 80), (48, 64), (48, 64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        check((112, 64), (80, 96))
        check((64, 128), (80, 96), (64, 64), (48, 48))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "needs a GPU, and MODEL.DEVICE is cpu"),
        (("MODEL.DEVICE", "cuda", "MODEL.COMPILE", True), "MODEL.COMPILE is True, which cannot"),
        (
            ("MODEL.DEVICE", "cuda", "MODEL.DETR.RESIDUAL_RAMP_ITERS", 5),
            "RESIDUAL_RAMP_ITERS is 5, which cannot",
        ),
    ],
)
def test_cuda_graphs_are_refused_where_they_cannot_work(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_config("MODEL.CUDA_GRAPHS", True, *overrides))


def test_tf32():
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        build_model(tiny_config())
        assert [backend.allow_tf32 for backend in backends] == before
        for value, expected in (("on", True), ("off", False)):
            build_model(tiny_config("MODEL.TF32", value))
            assert [backend.allow_tf32 for backend in backends] == [expected, expected]
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed
