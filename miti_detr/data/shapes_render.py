"""Pictures of the data set ``shapes``: circles, squares and triangles on textured backgrounds.

Every machine must draw the same bytes, so everything here is integer arithmetic on draws of numpy's
frozen legacy ``RandomState``; the one table of sines is rounded far from ties.

Frame: positions and lengths are integers in **quarter pixels**, x to the right, y down, origin at
the top left corner of the image. The centre of the pixel in row ``r`` and column ``c`` is
``(4c + 2, 4r + 2)``.
"""

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np

CLASSES = ("circle", "square", "triangle")
TEXTURES = ("gradient", "stripes", "blocks")  # of the background

SHORT_SIDE = (128, 160)  # smallest and largest shorter side of an image, pixels
LONG_SIDE = 224  # largest longer side, pixels
SIDE_STEP = 4  # sides are multiples of this many pixels

_EMPTY_PERCENT = 4  # images without objects
_OBJECT_COUNTS = (1, 1, 2, 2, 3, 4, 5)  # drawn uniformly
# Square root of the area, in quarter pixels, between which an object is drawn: COCO's small, medium
# and large, with a gap around the limits of 32 and 96 pixels, so that rounding cannot move an
# object over one.
_AREA_ROOTS = ((88, 112), (144, 340), (394, 480))
# Drawn uniformly; some find no room, large ones most often.
_SIZE_TABLE = (0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2)
_MIN_VISIBLE_PERCENT = 75
_PLACEMENT_TRIES = 30
_NOISE = 10  # largest change of a channel by noise, of 255

_STEPS = 240  # a turn; a multiple of 3, 4 and 24, the numbers of vertices
_SCALE = 14  # bits after the point in _COSINE
_COSINE = [round(math.cos(2 * math.pi * k / _STEPS) * 2**_SCALE) for k in range(_STEPS)]
_VERTICES = (24, 4, 3)  # of the polygon of each class
_RADIUS_OF_ROOT = (144, 181, 225)  # circumradius / sqrt(area) of each class, times 256


@dataclass(frozen=True)
class Shape:
    """One object of a picture.

    Attributes:
        label: index into :data:`CLASSES`.
        centre: (x, y), quarter pixels.
        radius: of the circle around the vertices, quarter pixels.
        polygon: (V, 2) vertices (x, y), quarter pixels. A circle is outlined by 24 vertices.
    """

    label: int
    centre: tuple[int, int]
    radius: int
    polygon: np.ndarray


def image_size(seed: int) -> tuple[int, int]:
    """Height and width, in pixels, of the picture of this seed (without drawing it)."""
    return _draw_size(np.random.RandomState(seed))


def render(seed: int) -> tuple[np.ndarray, list[Shape]]:
    """Draw the picture of a seed.

    Args:
        seed: any integer in [0, 2**32).

    Returns:
        The image, (H, W, 3) uint8 RGB, and its objects from bottom to top. Each lies inside the
        image, and at least 75 % of its pixels are not covered by later ones.
    """
    rng = np.random.RandomState(seed)
    height, width = _draw_size(rng)
    image, colours, _ = _draw_background(rng, height, width)
    shapes = _draw_scene(rng, height, width)
    for shape in shapes:
        colours.append(_draw_colour(rng, colours))
        window, mask = rasterise(shape)
        image[window][mask] = colours[-1]
    noise = rng.randint(-_NOISE, _NOISE + 1, size=image.shape, dtype=np.int8)
    return (image + noise).clip(0, 255).astype(np.uint8), shapes


def render_segments(seed: int) -> tuple[np.ndarray, list[int], int]:
    """Tell which object each pixel of the picture of a seed belongs to.

    Returns:
        (H, W) int64, i where the i-th object (from 1, in the order of :func:`render`) is visible
        and 0 in the background; the labels of the objects; the index of the background's texture in
        :data:`TEXTURES`.
    """
    rng = np.random.RandomState(seed)
    height, width = _draw_size(rng)
    *_, texture = _draw_background(rng, height, width)
    shapes = _draw_scene(rng, height, width)
    owner = np.zeros((height, width), dtype=np.int64)
    for number, shape in enumerate(shapes, start=1):
        window, mask = rasterise(shape)
        owner[window][mask] = number
    return owner, [shape.label for shape in shapes], texture


def rasterise(shape: Shape) -> tuple[tuple[slice, slice], np.ndarray]:
    """Pixels whose centre lies in the shape or on its edge.

    Returns:
        The window (rows, columns) of the image that holds the shape, and a bool mask of the size of
        that window.
    """
    left, top = shape.polygon.min(axis=0) // 4
    right, bottom = -(-shape.polygon.max(axis=0) // 4)
    x = 4 * np.arange(left, right, dtype=np.int64) + 2
    y = 4 * np.arange(top, bottom, dtype=np.int64)[:, None] + 2
    if CLASSES[shape.label] == "circle":
        mask = (x - shape.centre[0]) ** 2 + (y - shape.centre[1]) ** 2 <= shape.radius**2
    else:
        mask = np.ones((bottom - top, right - left), dtype=bool)
        for (ax, ay), (bx, by) in zip(
            shape.polygon, np.roll(shape.polygon, -1, axis=0), strict=True
        ):
            mask &= (bx - ax) * (y - ay) >= (by - ay) * (x - ax)
    return (slice(top, bottom), slice(left, right)), mask


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file without compression, which the noise in the pictures would defeat anyway.

    Args:
        image: (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits per channel, RGB
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each begins with filter type 0
    rows[:, 1:] = image.reshape(height, -1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def _integers(
    rng: np.random.RandomState, low: int, high: int, size: tuple[int, ...] = ()
) -> np.ndarray:
    """Uniform integers in [low, high]; the explicit type gives every platform the same stream."""
    return rng.randint(low, high + 1, size=size, dtype=np.int64)


def _integer(rng: np.random.RandomState, low: int, high: int) -> int:
    return int(_integers(rng, low, high))


def _draw_size(rng: np.random.RandomState) -> tuple[int, int]:
    short = _integer(rng, SHORT_SIDE[0] // SIDE_STEP, SHORT_SIDE[1] // SIDE_STEP)
    long = _integer(rng, short, LONG_SIDE // SIDE_STEP)
    height, width = (short, long) if _integer(rng, 0, 1) else (long, short)
    return SIDE_STEP * height, SIDE_STEP * width


def _draw_background(
    rng: np.random.RandomState, height: int, width: int
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """A texture between two near colours: (H, W, 3) int16, the colours, and which texture it is."""
    first = _integers(rng, 0, 255, (3,))
    second = (first + _integers(rng, -40, 40, (3,))).clip(0, 255)
    y, x = np.arange(height)[:, None], np.arange(width)
    texture = _integer(rng, 0, 2)
    along_x, along_y = _integers(rng, -2, 2, (2,))
    period = _integer(rng, 10, 40)
    blocks = _integers(rng, 0, 16, (-(-height // period), -(-width // period)))
    if texture == 0:
        ramp = along_x * x + along_y * y
        mix = 16 * (ramp - ramp.min()) // max(1, int(np.ptp(ramp)))
    elif texture == 1:
        mix = 16 * ((along_x * x + along_y * y) // period % 2)
    else:
        mix = blocks[y // period, x // period]
    tones = ((16 - np.arange(17)[:, None]) * first + np.arange(17)[:, None] * second) // 16
    return tones.astype(np.int16)[mix], [first, second], texture


def _draw_colour(rng: np.random.RandomState, used: list[np.ndarray]) -> np.ndarray:
    """Of some random colours the one farthest from those already used: (3,) int64."""
    candidates = _integers(rng, 0, 255, (16, 3))
    distances = np.abs(candidates[:, None] - np.stack(used)).sum(axis=-1)
    return candidates[distances.min(axis=1).argmax()]


def _draw_scene(rng: np.random.RandomState, height: int, width: int) -> list[Shape]:
    """Objects from bottom to top, larger ones first; one that finds no room is left out."""
    if _integer(rng, 0, 99) < _EMPTY_PERCENT:
        return []
    count = _OBJECT_COUNTS[_integer(rng, 0, len(_OBJECT_COUNTS) - 1)]
    sizes = [_SIZE_TABLE[i] for i in _integers(rng, 0, len(_SIZE_TABLE) - 1, (count,))]
    owner = np.zeros((height, width), dtype=np.int64)  # 0: background, i: i-th shape
    shapes: list[Shape] = []
    totals: list[int] = [1]  # pixels of background (never asked) and of each shape
    for size in sorted(sizes, reverse=True):
        for _ in range(_PLACEMENT_TRIES):
            shape = _draw_shape(rng, _AREA_ROOTS[size], height, width)
            if shape is None:
                continue
            window, mask = rasterise(shape)
            if _fits(owner, window, mask, totals):
                shapes.append(shape)
                totals.append(int(mask.sum()))
                owner[window][mask] = len(shapes)
                break
    return shapes


def _draw_shape(
    rng: np.random.RandomState, roots: tuple[int, int], height: int, width: int
) -> Shape | None:
    """A shape of random class, size, angle and position; None if it is larger than the image."""
    label = _integer(rng, 0, len(CLASSES) - 1)
    radius = _integer(rng, *roots) * _RADIUS_OF_ROOT[label] // 256
    angle = 0 if CLASSES[label] == "circle" else _integer(rng, 0, _STEPS - 1)
    outline = radius * _directions(_VERTICES[label], angle) + 2 ** (_SCALE - 1) >> _SCALE
    low = -outline.min(axis=0)
    high = (4 * width, 4 * height) - outline.max(axis=0)
    if (low > high).any():
        return None
    centre = (_integer(rng, int(low[0]), int(high[0])), _integer(rng, int(low[1]), int(high[1])))
    return Shape(label, centre, radius, outline + centre)


def _directions(count: int, angle: int) -> np.ndarray:
    """(count, 2) unit vectors, evenly spaced from ``angle`` (in steps) on, times 2**_SCALE."""
    steps = angle + np.arange(count) * (_STEPS // count)
    cosine = np.array(_COSINE, dtype=np.int64)
    return np.stack([cosine[steps % _STEPS], cosine[(steps - _STEPS // 4) % _STEPS]], axis=1)


def _fits(
    owner: np.ndarray, window: tuple[slice, slice], mask: np.ndarray, totals: list[int]
) -> bool:
    """Whether a new shape leaves enough of each earlier one visible, and lies mostly beside."""
    covered = np.bincount(owner[window][mask], minlength=len(totals))[1:]
    if 100 * covered.sum() > (100 - _MIN_VISIBLE_PERCENT) * mask.sum():
        return False
    visible = np.bincount(owner.ravel(), minlength=len(totals))[1:] - covered
    return bool((100 * visible >= _MIN_VISIBLE_PERCENT * np.array(totals[1:])).all())
