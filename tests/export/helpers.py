"""Images for exported models, and a comparison of their masks."""

from typing import Any

import numpy as np
import torch

from miti_detr.modeling.segmentation import SegmentationDetr
from miti_detr.predict.backends import SessionBackend, with_pixels
from miti_detr.predict.sessions import Session
from tests.fill import image

SIZES = [(50, 71), (64, 40), (33, 96)]  # none is a multiple of 32


def items(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Images of whole numbers, of outputs of another size."""
    return [
        {"image": image(f"{i}", h, w).to(torch.uint8), "height": 2 * h + 1, "width": w + 9}
        for i, (h, w) in enumerate(sizes)
    ]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same_masks(session: Session, model: SegmentationDetr) -> None:
    """In a padded batch and by themselves; pixels whose logit is almost 0 may be on either side."""
    different = []
    for sizes in (SIZES, SIZES[:1]):
        given = items(sizes)
        found = [with_pixels(one) for one in SessionBackend(session).detect(given)]
        with torch.no_grad():
            wanted = [x["instances"] for x in model(given)]
        for one, other in zip(found, wanted, strict=True):
            masks = other.pred_masks.numpy()
            assert 0.1 < masks.mean() < 0.9
            different.append((masks != masks[:1]).mean())
            assert one.masks.shape == masks.shape
            assert (one.masks != masks).mean() < 1e-4
            np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-4)
    assert np.mean(different) > 0.02
