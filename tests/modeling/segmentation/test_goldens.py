"""The published mask head in float64: outputs, losses, and both ways of post-processing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances

from miti_detr.checkpoint import convert_state_dict
from miti_detr.layers import box_cxcywh_to_xyxy
from miti_detr.modeling.segmentation import (
    confident_queries,
    merge_panoptic,
    published_instance_masks,
)
from tests.checkpoint.helpers import hollow, r50_config
from tests.fill import fill, image
from tests.helpers import load_golden

GOLDEN = load_golden("segmentation")
SIZES = ((160, 224), (192, 128))
QUERIES, WIDTH, HIDDEN = 10, 128, 256
EXACT = {"rtol": 1e-9, "atol": 1e-10}
AS_STORED = {"rtol": 0, "atol": 3e-7}  # the goldens are float32


@pytest.fixture(scope="module")
def model():
    """The published keys filled by rule, with the gains that the goldens' README states."""
    overrides = {
        "MODEL.DEVICE": "cpu",
        "MODEL.MASK_ON": True,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.DETR.NUM_CLASSES": 91,
        "MODEL.DETR.NUM_OBJECT_QUERIES": QUERIES,
        "MODEL.DETR.HIDDEN_DIM": WIDTH,
        "MODEL.DETR.DIM_FEEDFORWARD": HIDDEN,
        "MODEL.DETR.ENC_LAYERS": 2,
        "MODEL.DETR.DEC_LAYERS": 2,
        "MODEL.DETR.PADDING_MASK": "nearest",
        "MODEL.ACCELERATE": False,
    }
    made = build_model(r50_config(*(x for pair in overrides.items() for x in pair))).eval()
    shapes = {k: tuple(v.shape) for k, v in made.state_dict().items()}
    published = hollow("detr_panoptic")
    # Find the published key of each of our tensors by converting numbers instead of weights.
    numbers = {k: torch.full(v.shape[:1], i) for i, (k, v) in enumerate(published.items())}
    ours, _ = convert_state_dict(numbers, num_classes=None, masks=True)
    keys = list(published)
    state = {}
    for key, number in ours.items():
        if key in shapes:
            name = keys[int(number[0])]
            state[key] = fill(name, shapes[key])
            if "_linear.weight" in name:
                state[key] *= 4
            elif name == "mask_head.lay1.weight":
                state[key][:, WIDTH:] *= 64
            elif "adapter" in name and name.endswith("weight"):
                state[key] /= 64
    made.load_state_dict(state, strict=True)
    return made.double()


@pytest.fixture(scope="module")
def prediction(model):
    """Of the usual batch, normalised in float64 and rounded to float32 as the goldens were."""
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(3, 1, 1)
    images = [(image(f"image:{i}", *size).double() - mean) / std for i, size in enumerate(SIZES)]
    with torch.no_grad():
        return model.predict_set(ImageList.from_tensors([x.float().double() for x in images]), [])


@pytest.fixture(scope="module")
def masks(model, prediction):
    pairs = torch.cartesian_prod(torch.arange(2), torch.arange(QUERIES))
    with torch.no_grad():
        return model.mask_logits(prediction, *pairs.T).unflatten(0, (2, QUERIES))


@pytest.mark.slow
@torch.no_grad()
def test_outputs(model, prediction, masks):
    torch.testing.assert_close(prediction.logits, GOLDEN["post.logits"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(prediction.boxes, GOLDEN["post.boxes"], **EXACT)
    maps = model.bbox_attention(prediction.states, prediction.grid.memory, prediction.grid.mask)
    torch.testing.assert_close(maps[:, ::3], GOLDEN["post.attention_maps"].double(), **AS_STORED)
    every_third = GOLDEN["post.pred_masks_every_third_query"].double()
    torch.testing.assert_close(masks[:, ::3], every_third, **AS_STORED)
    moments = torch.stack([masks.mean((2, 3)), masks.std((2, 3))], dim=-1)
    torch.testing.assert_close(moments, GOLDEN["post.pred_masks_mean_std_per_query"], **EXACT)


@pytest.mark.slow
@torch.no_grad()
def test_losses(model, prediction):
    inputs = []
    for i, size in enumerate(SIZES):
        corners = box_cxcywh_to_xyxy(GOLDEN[f"in.boxes{i}"].double()) * torch.tensor(
            [size[1], size[0], size[1], size[0]]
        )
        rectangles = GOLDEN[f"in.mask_rectangles{i}_y0y1x0x1"].tolist()
        truth = torch.zeros(len(rectangles), *size, dtype=torch.bool)
        for mask, (y0, y1, x0, x1) in zip(truth, rectangles, strict=True):
            mask[y0:y1, x0:x1] = True
        instances = Instances(size, gt_boxes=Boxes(corners), gt_masks=BitMasks(truth))
        instances.gt_boxes.tensor = corners  # which Boxes round to float32
        instances.gt_classes = GOLDEN[f"in.labels{i}"]
        inputs.append({"instances": instances})
    losses = model.losses(prediction, inputs)
    names = [name for name in GOLDEN["post.loss_names"].tolist() if name.startswith("loss")]
    assert sorted(losses) == sorted(names)
    weights = {"loss_bbox": 5, "loss_giou": 2}
    for name, value in zip(
        GOLDEN["post.loss_names"].tolist(), GOLDEN["post.loss_values"], strict=True
    ):
        if name in losses:
            expected = value * weights.get(name.removesuffix("_0"), 1)
            # The no-object weight is a float32 0.1.
            tolerance = {"rtol": 1e-8, "atol": 0} if "_ce" in name else EXACT
            torch.testing.assert_close(losses[name], expected, **tolerance)


@pytest.mark.slow
def test_instance_masks(masks):
    for i, (size, output) in enumerate(zip(SIZES, ((80, 112), (100, 70)), strict=True)):
        found = published_instance_masks(masks[i], padded=(192, 224), image=size, output=output)
        shape = GOLDEN[f"post.instance_masks{i}_shape"].tolist()
        packed = GOLDEN[f"post.instance_masks{i}_packed"].numpy()
        expected = np.unpackbits(packed)[: np.prod(shape)].reshape(shape)[:, 0]
        assert (found.numpy() == expected).all()


@pytest.mark.parametrize("i", [0, 1])
def test_panoptic(i):
    logits, masks = (GOLDEN[f"panoptic.in.{name}"][i].double() for name in ("logits", "masks"))
    sizes = (GOLDEN[f"panoptic.{name}_sizes"][i].tolist() for name in ("processed", "target"))
    processed, target = map(tuple, sizes)
    queries, classes = confident_queries(logits, 0.85)
    resized = F.interpolate(masks[queries][:, None], size=processed, mode="bilinear")[:, 0]
    stuff = range(int(GOLDEN["panoptic.is_thing_up_to"]) + 1, logits.shape[-1] - 1)
    ids, segments = merge_panoptic(classes, resized, stuff=stuff, output=target)
    # Published ids start at 0, which is "no segment" for Detectron2.
    assert torch.equal(
        ids.long() - int(bool(segments)), GOLDEN[f"panoptic.t0.85.image{i}.ids"].long()
    )
    rows = [[s["id"] - 1, s["isthing"], s["category_id"], s["area"]] for s in segments]
    expected = GOLDEN[f"panoptic.t0.85.image{i}.segments_id_thing_category_area"].tolist()
    assert rows == expected
