import warnings

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from torch import Tensor
from torch.testing import assert_close

from miti_detr.export import TensorDetector
from miti_detr.modeling import MitiDetr
from tests.fill import filled, image
from tests.helpers import tiny_config

SHAPES = ([(96, 80)], [(64, 128), (90, 40)], [(33, 70), (61, 61), (48, 96)])


def batch(sizes: list[tuple[int, int]], beyond: float = 0.0) -> tuple[Tensor, Tensor]:
    """Images in the corners of a batch, filled with a number, and their sizes."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = torch.full((len(sizes), 3, height, width), beyond)
    for index, (h, w) in enumerate(sizes):
        images[index, :, :h, :w] = image(f"{index}", h, w)
    return images, torch.tensor(sizes)


def eager(model: MitiDetr, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Boxes, scores and classes of the model's own batch."""
    inputs = [{"image": image(f"{i}", *size)} for i, size in enumerate(sizes)]
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        results = model.read_detections(model.predict_set(images, inputs), images.image_sizes)
    for result in results:
        result.pred_boxes.clip(result.image_size)
    fields = [(r.pred_boxes.tensor, r.scores, r.pred_classes) for r in results]
    return [torch.stack(field) for field in zip(*fields, strict=True)]


def variant(*overrides: object) -> MitiDetr:
    model = build_model(tiny_config("MODEL.ACCELERATE", False, *overrides)).eval()
    model.load_state_dict(filled(model.state_dict()))
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("MODEL.DETR.SIZE_DIVISIBILITY", 32),
        ("MODEL.DETR.PADDING_MASK", "nearest"),
        ("MODEL.DETR.POSITION_EMBEDDING", "learned"),
    ],
)
def test_it_computes_what_the_model_computes(overrides: tuple[object, ...]) -> None:
    """Whatever the batch holds beyond its images."""
    model = variant(*overrides)
    detector = TensorDetector(model)
    for sizes in SHAPES:
        wanted = eager(model, sizes)
        for beyond in (0.0, 200.0):
            with torch.no_grad():
                found = detector(*batch(sizes, beyond))
            assert_close(list(found), wanted, rtol=0, atol=2e-4)


def test_bytes_and_floats(model: MitiDetr) -> None:
    images, sizes = batch(SHAPES[1])
    with torch.no_grad():
        first = TensorDetector(model)(images, sizes)
        second = TensorDetector(model)(images.to(torch.uint8), sizes)
    assert_close(first, second, rtol=0, atol=0)


def test_half_precision_changes_little_and_not_the_model(model: MitiDetr) -> None:
    half = TensorDetector(model, half=True)
    with torch.no_grad():
        boxes, scores, _ = half(*batch(SHAPES[1]))
    wanted = eager(model, SHAPES[1])
    assert boxes.dtype == scores.dtype == torch.float32
    assert_close(scores, wanted[1], rtol=0, atol=2e-2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_trace_takes_other_numbers_and_sizes(model: MitiDetr) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(TensorDetector(model), batch(SHAPES[1]))
        for sizes in SHAPES:
            assert_close(list(traced(*batch(sizes))), eager(model, sizes), rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("accelerate", [False, True])
def test_detectron2s_tracing_adapter_takes_other_sizes(accelerate: bool) -> None:
    """As ``tools/deploy/export_model.py`` of Detectron2 uses it, with one image."""
    model = build_model(tiny_config("MODEL.ACCELERATE", accelerate)).eval()
    model.load_state_dict(filled(model.state_dict()))
    inputs = [{"image": image("a", 96, 80)}]
    adapter = TracingAdapter(model, inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for height, width in ((96, 80), (64, 128), (51, 77)):
            pixels = image("b", height, width)
            found = adapter.outputs_schema(traced(pixels))[0]["instances"]
            wanted = model([{"image": pixels}])[0]["instances"]
            assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=0, atol=1e-3)
            assert_close(found.scores, wanted.scores, rtol=0, atol=1e-5)


def test_a_pre_training_is_refused() -> None:
    cfg = tiny_config("MODEL.META_ARCHITECTURE", "UpDetr", "MODEL.DETR.NUM_CLASSES", 2)
    cfg.merge_from_list(["INPUT.PATCHES.NUMBER", 1, "MODEL.DETR.LAYER_RESIDUAL", "none"])
    with pytest.raises(ValueError, match="UpDetr is not a detector that can be exported"):
        TensorDetector(build_model(cfg))
