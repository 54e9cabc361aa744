import pytest
import torch

from miti_detr.modeling.segmentation import published_instance_masks, resize_logits

PADDED, IMAGE = (32, 64), (24, 32)


def test_padding_is_cropped_before_the_resize():
    """A mask over the left half of an image, which is a quarter of its padded batch.

    It is still the left half in an output frame of another size. (The published Detectron2 wrapper
    resizes the padded mask to the whole frame, where it would be the left quarter.)
    """
    logits = torch.full((1, 8, 16), -1.0)
    logits[..., :4] = 1
    masks = resize_logits(logits, padded=PADDED, image=IMAGE, output=(60, 100)) > 0
    assert masks.shape == (1, 60, 100)
    assert masks[..., :50].all()
    assert not masks[..., 50:].any()


@pytest.mark.parametrize("output", [(48, 64), IMAGE, (11, 29)])
def test_a_slope_stays_a_slope(output):
    """logit = x - c: bilinear interpolation keeps a linear function, away from the borders."""
    x = 4 * torch.arange(16.0) + 2  # centres of the cells in pixels
    logits = (x - 16).expand(1, 8, 16)
    found = resize_logits(logits, padded=PADDED, image=IMAGE, output=output)[0]
    centres = (torch.arange(output[1]) + 0.5) * IMAGE[1] / output[1]
    inner = (centres > 3) & (centres < 29)
    expected = (centres - 16).expand(output)
    torch.testing.assert_close(found[:, inner], expected[:, inner], rtol=0, atol=1e-4)


def test_published_masks_have_coarser_edges():
    """They are thresholded at the size of the image, so that enlarging shows its pixels."""
    x = 4 * torch.arange(16.0) + 2
    logits = (x - 15.3).expand(1, 8, 16)
    frames = {"padded": PADDED, "image": IMAGE, "output": (96, 128)}
    published = published_instance_masks(logits, **frames)
    ours = resize_logits(logits, **frames) > 0
    assert published[0, 0].nonzero().min() == 4 * 15  # the first pixel whose centre is inside
    assert ours[0, 0].nonzero().min() == round(4 * 15.3)
