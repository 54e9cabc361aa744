import pytest
import torch
import torch.nn.functional as F

from miti_detr.modeling.segmentation import AttentionMap, MaskHead
from tests.modeling.test_detr import config_of, trainable

PYRAMID = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"])


def test_parameters_of_the_published_head():
    parts = AttentionMap(256, 8), MaskHead(256, 8, [1024, 512, 256])
    assert sum(p.numel() for part in parts for p in part.parameters()) == 1_333_657


@pytest.mark.parametrize(("classes", "count"), [(91, 42_636_025), (250, 42_676_888)])
def test_trainable_parameters_of_r50(classes, count):
    overrides = ("MODEL.MASK_ON", True, "MODEL.DETR.NUM_CLASSES", classes, *PYRAMID)
    assert trainable(config_of("coco/detr_R50.yaml", *overrides)) == count


def test_attention_is_shared_by_heads_and_cells():
    """exp(s) / sum of exp(s) over all heads and unpadded cells; 0 where there is padding."""
    torch.manual_seed(0)
    attention = AttentionMap(16, 4).double()
    states, memory = torch.randn(2, 3, 16).double(), torch.randn(2, 16, 5, 6).double()
    mask = torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[1, :, 4:] = True
    maps = attention(states, memory, mask)
    assert not maps[1, ..., 4:].any()
    torch.testing.assert_close(maps.sum((2, 3, 4)), torch.ones(2, 3).double())
    query = attention.q_linear(states[1, 2]).view(4, 4)
    key = attention.k_linear(memory[1, :, 2, 3]).view(4, 4)
    scores = (query * key).sum(1) / 2  # sqrt(16 / 4)
    at_cell = maps[1, 2, :, 2, 3]
    torch.testing.assert_close(at_cell / at_cell[0], (scores - scores[0]).exp())


def published(head, source, maps, pyramid, image):
    """The head in the words of the published code: every pair has its own copy of all inputs."""
    x = torch.cat([source[image], maps], dim=1)
    for k in (1, 2):
        x = F.relu(getattr(head, f"gn{k}")(getattr(head, f"lay{k}")(x)))
    for k, feature in enumerate(pyramid, start=1):
        adapted = getattr(head, f"adapter{k}")(feature[image])
        x = adapted + F.interpolate(x, size=adapted.shape[-2:], mode="nearest")
        x = F.relu(getattr(head, f"gn{k + 2}")(getattr(head, f"lay{k + 2}")(x)))
    return head.out_lay(x)[:, 0]


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
def test_head_equals_the_published_one(levels):
    """Values and gradients, for pairs in any order; relative 1e-9 in float64."""
    torch.manual_seed(0)
    head = MaskHead(32, 4, [12, 6, 3][:levels]).double()
    source, maps = torch.randn(2, 32, 3, 4).double(), torch.randn(5, 4, 3, 4).double()
    sizes = [(6, 7), (12, 14), (23, 28)][:levels]
    pyramid = [
        torch.randn(2, channels, *size).double()
        for channels, size in zip([12, 6, 3], sizes, strict=False)
    ]
    image = torch.tensor([1, 0, 1, 1, 0])
    found, expected = (f(source, maps, pyramid, image) for f in (head, published_of(head)))
    assert found.shape == (5, *([(3, 4), *sizes][-1]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    parameters = list(head.parameters())
    weight = torch.randn_like(found)
    pairs = zip(
        torch.autograd.grad((found * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        strict=True,
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def published_of(head):
    return lambda *arguments: published(head, *arguments)


def test_a_width_that_is_too_small():
    with pytest.raises(ValueError, match="HIDDEN_DIM is 8; masks need at least 16"):
        MaskHead(8, 2, [4, 4, 4])
