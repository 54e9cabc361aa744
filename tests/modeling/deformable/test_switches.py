"""Speed switches of Deformable-DETR against the plain path."""

import pytest
import torch
from detectron2.modeling import build_model

from tests.fill import filled
from tests.helpers import training_input

from .helpers import KINDS, tiny

FROZEN = ("MODEL.RESNETS.NORM", "FrozenBN")
PLAIN = (*FROZEN, "MODEL.ACCELERATE", False)
INPUTS = [
    training_input((64, 96), [[4, 5, 30, 40], [20, 20, 44, 60]], [0, 2]),
    training_input((80, 72), [[1, 2, 9, 9]], [1], seed=1),
]


def model(kind, *overrides):
    made = build_model(tiny(kind, *overrides))
    made.load_state_dict(filled(made.state_dict()))
    return made


def step(made):
    """Losses and gradients of a training step."""
    torch.manual_seed(0)
    losses = made.train()(INPUTS)
    sum(losses.values()).backward()
    return losses, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "overrides",
    [FROZEN, (*FROZEN, "MODEL.DETR.ACTIVATION_CHECKPOINT", True, "MODEL.DETR.DROPOUT", 0.0)],
    ids=["accelerated", "recomputed"],
)
def test_training_step_equals_the_plain_path(kind, overrides):
    """Losses to 1e-4, gradients to 1 % of their norm."""
    losses, gradients = step(model(kind, *overrides))
    expected_losses, expected = step(model(kind, *PLAIN))
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        error = float((gradients[name] - gradient).norm())
        assert error <= 0.01 * float(gradient.norm()) + 1e-6, name


@pytest.mark.slow
def test_compiled_as_one_graph():
    """Seen without generating code."""
    small = ("MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1)
    made, eager = (model("two_stage", *FROZEN, *small).eval() for _ in range(2))
    made.transformer.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        result, expected = made.predict(INPUTS), eager.predict(INPUTS)
    torch.testing.assert_close(result.boxes, expected.boxes, rtol=0, atol=1e-5)


def test_bfloat16_in_evaluation():
    exact, made = model("refine", *FROZEN), model("refine", *FROZEN, "TEST.AMP.ENABLED", True)
    with torch.no_grad():
        expected, result = exact.eval().predict(INPUTS), made.eval().predict(INPUTS)
    assert result.boxes.dtype == torch.float32
    assert (result.boxes - expected.boxes).abs().mean() < 0.03
    assert (result.boxes - expected.boxes).abs().max() > 0


def test_bfloat16_in_training():
    with torch.autocast("cpu", torch.bfloat16):
        losses = model("two_stage", *FROZEN).train()(INPUTS)
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
