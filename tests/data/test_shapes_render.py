import hashlib
import io
import math

import numpy as np
import pytest
from PIL import Image

from miti_detr.data import shapes_render
from miti_detr.data.shapes_render import CLASSES, Shape, encode_png, image_size, rasterise, render

SEEDS = range(250)


@pytest.fixture(scope="module")
def pictures() -> list[tuple[np.ndarray, list[Shape]]]:
    return [render(seed) for seed in SEEDS]


def _area(shape: Shape) -> float:
    """Shoelace formula, in square pixels."""
    x, y = shape.polygon.T / 4
    return float((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)


@pytest.mark.slow
def test_bytes_are_pinned(pictures) -> None:
    """Every machine draws these bytes; a change of them changes published numbers."""
    digest = hashlib.sha256()
    for image, _ in pictures[:40]:
        digest.update(image.tobytes())
    assert digest.hexdigest() == "926524e3ce5d04a8bcee1bbbd1273d52ab26ba21abc20a8f2c5309f4bd281731"


def test_no_cosine_is_near_a_tie() -> None:
    """A sine that differs in its last bit on another machine rounds to the same integer."""
    exact = [math.cos(2 * math.pi * k / 240) * 2**14 for k in range(240)]
    assert min(abs(v - math.floor(v) - 0.5) for v in exact) > 1e-4


def test_sizes_vary_by_steps(pictures) -> None:
    sizes = np.array([image.shape[:2] for image, _ in pictures])
    assert [image_size(seed) for seed in SEEDS] == [tuple(size) for size in sizes.tolist()]
    assert (sizes % 4 == 0).all()
    assert sizes.min() >= 128
    assert sizes.min(axis=1).max() <= 160
    assert sizes.max() <= 224
    wide = (sizes[:, 1] > sizes[:, 0]).mean()
    assert 0.3 < wide < 0.7
    assert len({tuple(size) for size in sizes.tolist()}) > 100


def test_objects_are_small_medium_and_large(pictures) -> None:
    """COCO's limits: 32**2 and 96**2 square pixels; large ones find room least often."""
    areas = np.array([_area(shape) for _, shapes in pictures for shape in shapes])
    shares = np.histogram(areas, bins=[0, 32**2, 96**2, 1e9])[0] / len(areas)
    np.testing.assert_allclose(shares, [0.15, 0.55, 0.3], atol=0.06)


def test_counts_and_classes(pictures) -> None:
    counts = np.bincount([len(shapes) for _, shapes in pictures])
    assert len(counts) == 6
    assert (counts > 0).all()
    assert counts[0] < 0.1 * len(pictures)
    labels = np.bincount([shape.label for _, shapes in pictures for shape in shapes])
    assert len(labels) == len(CLASSES)
    assert labels.min() > 0.2 * labels.sum()


@pytest.mark.slow
def test_shapes_lie_inside_and_are_visible(pictures) -> None:
    """Each box lies inside the image, is at least 20 pixels wide, and 75 % of it stays visible."""
    overlaps = 0
    for image, shapes in pictures:
        owner = np.zeros(image.shape[:2], dtype=int)
        totals = []
        for number, shape in enumerate(shapes, start=1):
            assert (shape.polygon >= 0).all()
            assert (shape.polygon <= (4 * image.shape[1], 4 * image.shape[0])).all()
            assert (np.ptp(shape.polygon, axis=0) >= 4 * 20).all()
            window, mask = rasterise(shape)
            totals.append(mask.sum())
            owner[window][mask] = number
        visible = np.bincount(owner.ravel(), minlength=len(shapes) + 1)[1:]
        assert (visible >= 0.75 * np.array(totals)).all()
        overlaps += int((visible < totals).any())
    assert overlaps > 0.1 * len(pictures)


def test_shapes_contrast_with_what_surrounds_them(pictures) -> None:
    """The mean colour of a visible shape differs from that of the rest by 60 of 765 at least."""
    for image, shapes in pictures:
        owner = np.zeros(image.shape[:2], dtype=int)
        for number, shape in enumerate(shapes, start=1):
            window, mask = rasterise(shape)
            owner[window][mask] = number
        means = np.array([image[owner == k].mean(axis=0) for k in range(len(shapes) + 1)])
        if shapes:
            assert np.abs(means[1:] - means[0]).sum(axis=1).min() > 60


def test_rasterise_area_is_that_of_the_shape(pictures) -> None:
    """As many centres are inside as the area has square pixels, up to a share of the outline.

    The polygon of a circle has 24 vertices: its area is 12 r^2 sin(15 deg), 1.1 % less than pi r^2.
    """
    for _, shapes in pictures[:60]:
        for shape in shapes:
            expected = _area(shape)
            if CLASSES[shape.label] == "circle":
                expected = math.pi * (shape.radius / 4) ** 2
            outline = 2 * math.pi * shape.radius / 4
            assert abs(rasterise(shape)[1].sum() - expected) < 0.3 * outline


def test_rasterise_square_by_hand() -> None:
    """The square 1..3 x 2..4 pixels holds the centres of pixels 1, 2 across and 2, 3 down."""
    corners = np.array([[4, 8], [12, 8], [12, 16], [4, 16]])
    shape = Shape(CLASSES.index("square"), (8, 12), 6, corners)
    window, mask = rasterise(shape)
    assert window == (slice(2, 4), slice(1, 3))
    assert mask.all()


def test_png_is_read_back_by_pillow() -> None:
    image, _ = render(3)
    data = encode_png(image)
    read = Image.open(io.BytesIO(data))
    assert read.format == "PNG"
    np.testing.assert_array_equal(np.asarray(read), image)


def test_a_shape_too_large_for_the_image_is_refused() -> None:
    rng = np.random.RandomState(0)
    assert shapes_render._draw_shape(rng, (400, 480), 64, 64) is None
