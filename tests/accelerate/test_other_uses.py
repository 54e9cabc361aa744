"""An accelerated model where it is used in other ways than it was built for."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from miti_detr.accelerate import accelerate
from tests.accelerate.test_accelerate import INPUTS, edit_in_place, model
from tests.helpers import threads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_another_precision(dtype):
    """The whole model in a lower precision, after it has worked in float32, and back."""
    ours, plain = (model(accelerated=a).eval() for a in (True, False))
    with torch.no_grad():
        ours.predict(INPUTS)
        ours.to(dtype), plain.to(dtype)
        image = torch.rand(2, 3, 96, 128).to(dtype)
        for first, second in zip(
            ours.backbone.body(image).values(), plain.backbone.body(image).values(), strict=True
        ):
            assert first.dtype == dtype
            error = (first.float() - second.float()).norm() / second.float().norm()
            assert error < 0.05
        ours.float(), plain.float()
        torch.testing.assert_close(
            ours.predict(INPUTS).logits, plain.predict(INPUTS).logits, rtol=1e-3, atol=1e-3
        )


def test_weights_made_in_inference_mode():
    """They have no version counter, so that only their values tell a change."""
    with torch.inference_mode():
        ours, plain = (model(accelerated=a).eval() for a in (True, False))
        before = ours.predict(INPUTS).logits
        edit_in_place(ours)
        plain.load_state_dict(dict(ours.state_dict()))
        found, expected = (m.predict(INPUTS).logits for m in (ours, plain))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.slow
def test_other_detectors_of_detectron2():
    """RetinaNet and Faster R-CNN with frozen batch norms: the same losses and gradients."""
    from detectron2 import model_zoo

    for file in (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    ):
        cfg = model_zoo.get_config(file)
        cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
        torch.manual_seed(0)
        plain = build_model(cfg).backbone.train()
        torch.manual_seed(0)
        ours = accelerate(build_model(cfg)).backbone.train()
        assert ours.state_dict().keys() == plain.state_dict().keys()
        image = torch.rand(1, 3, 64, 96)
        gradients = []
        for part in (plain, ours):
            features = part(image)
            sum(f.square().mean() for f in features.values()).backward()
            gradients.append({n: p.grad for n, p in part.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():
            atol = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("count", [4, 16])
def test_many_threads(count):
    losses = []
    for accelerated in (True, False):
        made = model(accelerated=accelerated).train()
        with threads(count):
            total = sum(made(INPUTS).values())
            total.backward()
        losses.append(total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_exported_program_is_the_same_function():
    ours, plain = (model(accelerated=a).eval() for a in (True, False))
    image = torch.rand(1, 3, 96, 128)
    layer, tokens = ours.transformer.encoder.layers[0], torch.rand(1, 48, 128)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.layer = ours.backbone.body, layer

        def forward(self, image, tokens):
            return self.body(image)["res3"], self.layer(tokens)

    with torch.no_grad():
        program = torch.export.export(Parts(), (image, tokens)).module()
        features, states = program(image, tokens)
        torch.testing.assert_close(
            features, plain.backbone.body(image)["res3"], rtol=1e-3, atol=1e-3
        )
        expected = plain.transformer.encoder.layers[0](tokens)
        torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
