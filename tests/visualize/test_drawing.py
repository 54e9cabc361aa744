import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from miti_detr.visualize.classes import ClassTable
from miti_detr.visualize.drawing import (
    class_colour,
    detection_labels,
    draw_boxes,
    draw_instances,
    resize_for_reading,
    to_picture,
)

GREY = (128, 128, 128)


def grey(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), GREY)


def test_a_box_is_drawn_where_it_is() -> None:
    """The outline is coloured; inside and outside are unchanged."""
    picture = draw_boxes(grey(100, 80), np.array([[20.0, 30.0, 60.0, 70.0]]), [2], [""])
    for point in ((20, 30), (60, 70), (40, 30), (20, 50)):
        assert picture.getpixel(point) == class_colour(2), point
    for point in ((40, 50), (10, 10), (63, 50)):
        assert picture.getpixel(point) == GREY, point


def test_a_label_stays_inside_the_image() -> None:
    """In the upper right corner the label moves into the box and to the left."""
    picture = draw_boxes(grey(100, 80), np.array([[90.0, 0.0, 99.0, 9.0]]), [0], ["circle 0.99"])
    pixels = np.asarray(picture)
    coloured = (pixels == class_colour(0)).all(-1)
    assert coloured[:14, 30:90].sum() > 300
    assert not coloured[20:].any()


def test_the_image_is_not_changed() -> None:
    image = grey(50, 50)
    draw_boxes(image, np.array([[5.0, 5.0, 40.0, 40.0]]), [0], ["a"])
    assert image.getcolors() == [(2500, GREY)]


@pytest.mark.parametrize(
    "box",
    [
        [-50.0, -50.0, 500.0, 500.0],
        [30.0, 30.0, 10.0, 10.0],
        [10.0, 10.0, 10.0, 10.0],
        [float("nan"), 0.0, float("inf"), 5.0],
        [200.0, 200.0, 300.0, 300.0],
    ],
)
def test_odd_boxes_do_no_harm(box: list[float]) -> None:
    picture = draw_boxes(grey(60, 40), np.array([box]), [0], ["thing 1.00"])
    assert picture.size == (60, 40)


def test_no_detection_leaves_the_image() -> None:
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.zeros(0, 4))
    instances.scores = torch.zeros(0)
    instances.pred_classes = torch.zeros(0, dtype=torch.int64)
    picture = draw_instances(grey(60, 40), instances, ClassTable(["a"], [1]))
    assert picture.getcolors() == [(2400, GREY)]


def test_detections_scale_with_the_picture_and_the_surest_lies_on_top() -> None:
    """Coordinates double from a frame of 50 x 50 to a picture of 100 x 100."""
    instances = Instances((50, 50))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 30, 40, 45], [10, 30, 40, 45]]))
    instances.scores = torch.tensor([0.9, 0.6])
    instances.pred_classes = torch.tensor([0, 1])
    classes = ClassTable(["a", "b"], [1, 2])
    picture = draw_instances(grey(100, 100), instances, classes)
    assert picture.getpixel((80, 90)) == class_colour(0)
    assert detection_labels(instances, classes) == ["a 0.90", "b 0.60"]


def test_colours_of_80_classes_differ() -> None:
    assert len({class_colour(index) for index in range(80)}) == 80


@pytest.mark.parametrize(
    ("size", "shrink", "expected", "scale"),
    [
        ((64, 32), False, (320, 160), 5.0),
        ((640, 64), False, (640, 64), 1.0),
        ((640, 64), True, (320, 32), 0.5),
        ((2, 2000), True, (1, 320), 0.16),
        ((320, 10), True, (320, 10), 1.0),
    ],
)
def test_pictures_get_a_readable_size(
    size: tuple[int, int], shrink: bool, expected: tuple[int, int], scale: float
) -> None:
    image, factor = resize_for_reading(grey(*size), 320, shrink=shrink)
    assert image.size == expected
    assert factor == pytest.approx(scale)


def test_channel_order() -> None:
    array = np.zeros((2, 3, 3), dtype=np.uint8)
    array[:, :, 0] = 255
    assert to_picture(array, "RGB").getpixel((0, 0)) == (255, 0, 0)
    assert to_picture(array, "BGR").getpixel((0, 0)) == (0, 0, 255)
