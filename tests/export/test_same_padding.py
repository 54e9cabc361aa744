"""Networks of timm that pad as TensorFlow does are recorded, in any size, and compute the same."""

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.engine import setup_config
from miti_detr.export import TensorDetector
from miti_detr.export.writers import record_program
from miti_detr.modeling import MitiDetr
from tests.fill import filled
from tests.helpers import ROOT

pytest.importorskip("timm")


@pytest.fixture(scope="module")
def detector() -> tuple[MitiDetr, TensorDetector]:
    options = ("MODEL.WEIGHTS", "", "MODEL.ACCELERATE", "False", "MODEL.DETR.ENC_LAYERS", "1")
    config = str(ROOT / "configs/finetune/Base-finetune.yaml")
    cfg = setup_config(config, [*options, "MODEL.DETR.DEC_LAYERS", "1"])
    model = build_model(cfg).eval()
    model.load_state_dict(filled(model.state_dict()))
    model.requires_grad_(False)
    return model, TensorDetector(model)


def test_the_model_stays_as_it_is_and_the_copy_computes_the_same(
    detector: tuple[MitiDetr, TensorDetector],
) -> None:
    model, copied = detector
    assert any(type(m).__name__ == "Conv2dSame" for m in model.modules())
    assert not any(type(m).__name__ == "Conv2dSame" for m in copied.modules())
    images = torch.rand(1, 3, 64, 96)
    for plain, fixed in zip(
        model.backbone.body(images).values(),
        copied.model.backbone.body(images).values(),
        strict=True,
    ):
        torch.testing.assert_close(fixed, plain)


@pytest.mark.slow
def test_it_is_recorded_for_any_size(detector: tuple[MitiDetr, TensorDetector]) -> None:
    """Without fixed padding, recording did not end within ten minutes."""
    program = record_program(detector[1], shape=None, image_type="uint8").module()
    for height, width in ((50, 70), (96, 40)):
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        sizes = torch.tensor([[height, width], [height - 9, width - 20]])
        torch.testing.assert_close(program(images, sizes), detector[1](images, sizes))
