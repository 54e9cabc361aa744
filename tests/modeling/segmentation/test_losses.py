import math

import pytest
import torch
import torch.nn.functional as F

from miti_detr.modeling.segmentation.losses import at_pixels, at_points, mask_losses

ONE = torch.tensor(1.0, dtype=torch.float64)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_losses_of_a_constant_probability(p):
    """A share f of the pixels belongs to the mask, and every pixel has the probability p.

    focal = - f / 4 (1-p)^2 log p - (1-f) 3/4 p^2 log(1-p)
    dice = 1 - (2 n f p + 1) / (n p + n f + 1)
    """
    n, f = 40, 0.25
    logits = torch.full((2, n), math.log(p / (1 - p)), dtype=torch.float64)
    truth = torch.zeros(2, n, dtype=torch.float64)
    truth[:, : int(n * f)] = 1
    focal, dice = mask_losses(logits, truth, torch.tensor(4.0))
    expected = -f / 4 * (1 - p) ** 2 * math.log(p)
    expected -= (1 - f) * 3 / 4 * p**2 * math.log(1 - p)
    torch.testing.assert_close(focal, 2 / 4 * expected * ONE, rtol=1e-9, atol=0)
    expected = 1 - (2 * n * f * p + 1) / (n * p + n * f + 1)
    torch.testing.assert_close(dice, 2 / 4 * expected * ONE, rtol=1e-9, atol=0)


def test_right_masks_cost_nothing():
    truth = (torch.arange(64).view(1, 8, 8) % 3 == 0).expand(2, 8, 8)
    logits = 40.0 * truth - 20
    assert max(mask_losses(*at_pixels(logits, truth), ONE)) < 1e-3


def test_pixels_are_those_of_the_padded_batch():
    logits, truth = torch.randn(3, 4, 5), torch.rand(3, 15, 19) > 0.5
    found, wanted = at_pixels(logits, truth)
    enlarged = F.interpolate(logits[None], size=(15, 19), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found.view(3, 15, 19), enlarged, rtol=0, atol=0)
    assert torch.equal(wanted.view(3, 15, 19).bool(), truth)


def test_points_gather_where_the_mask_is_uncertain():
    """Logits rise with x from -8 to 8: most points lie near the middle, where they are 0."""
    logits = torch.linspace(-8, 8, 33).expand(4, 33, 33)
    torch.manual_seed(0)
    found, _ = at_points(logits, torch.zeros(4, 33, 33, dtype=torch.bool), 200)
    assert found.shape == (4, 200)
    # 150 of 200 are the least certain of 600 uniform ones, |x| < 8 / 4; of the other 50 a quarter.
    share = (found.abs() < 2.2).float().mean()
    assert 0.75 < share < 0.9


def test_points_read_logits_and_truth_at_the_same_place():
    """Both grow with x in the frame of the padded batch, on grids of different size."""
    truth = (torch.arange(64) >= 32).expand(2, 64, 64)
    logits = ((torch.arange(16) + 0.5) / 16 - 0.5).expand(2, 16, 16).contiguous()
    found, wanted = at_points(logits, truth, 500)
    clear = found.abs() > 1 / 64
    assert torch.equal(found[clear] > 0, wanted[clear] > 0.5)


@pytest.mark.parametrize("count", [0, 9])
def test_no_match(count):
    """Losses are 0, and their gradient exists."""
    logits = torch.randn(0, 4, 5, requires_grad=True)
    truth = torch.zeros(0, 16, 20, dtype=torch.bool)
    pair = at_points(logits, truth, count) if count else at_pixels(logits, truth)
    losses = mask_losses(*pair, ONE)
    assert [x.item() for x in losses] == [0, 0]
    sum(losses).backward()
    assert logits.grad.shape == (0, 4, 5)
