"""A recorded Deformable-DETR holds for other sizes and numbers of images."""

import pytest
import torch
from detectron2.modeling import build_model

from miti_detr.export.tensor_detector import TensorDetector
from tests.fill import filled
from tests.modeling.deformable.helpers import tiny


def images(sizes: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    generator = torch.Generator().manual_seed(0)
    shape = (len(sizes), 3, height, width)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return pixels, torch.tensor(sizes)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["base", "two_stage"])
def test_traced_detector(kind: str) -> None:
    """Sizes of levels, padding and references are no constants: boxes to 1e-3 pixels."""
    model = build_model(tiny(kind, "MODEL.DETR.ENC_LAYERS", 1)).eval().requires_grad_(False)
    model.load_state_dict(filled(model.state_dict()))
    detector = TensorDetector(model)
    traced = torch.jit.trace(detector, images([(64, 96), (48, 80)]))
    for sizes in ([(96, 120)], [(70, 64), (72, 50), (33, 64)]):
        given = images(sizes)
        for found, expected in zip(traced(*given), detector(*given), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
