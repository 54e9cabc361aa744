"""Labelled boxes and masks on images; importable without torch, Detectron2 and matplotlib."""

import colorsys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .classes import ClassTable

if TYPE_CHECKING:
    from detectron2.structures import Instances

Colour = tuple[int, int, int]
_TINT = 0.45  # share of the colour of a mask


def class_colour(index: int) -> Colour:
    """Return the RGB colour of a class; neighbouring indices have very different hues."""
    hue = (0.58 + index * 0.618034) % 1.0
    # Every second group of eight is darker, so that many classes can be told apart.
    value = 0.95 if (index // 8) % 2 == 0 else 0.7
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


@lru_cache(maxsize=16)
def load_font(size: int) -> Any:
    """Return matplotlib's DejaVu Sans at ``size`` pixels, which is the same on every machine.

    Without matplotlib, it is the font that Pillow has.
    """
    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(size)
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def resize_for_reading(
    image: Image.Image, longest: int, *, shrink: bool
) -> tuple[Image.Image, float]:
    """Scale an image so that its longer side is ``longest`` pixels.

    Args:
        image: image of any mode.
        longest: length of the longer side, pixels.
        shrink: whether larger images are reduced; otherwise they are returned unchanged.

    Returns:
        The image, and the factor from old to new pixels.
    """
    scale = longest / max(image.size)
    if scale == 1 or (scale < 1 and not shrink):
        return image, 1.0
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC), scale


def draw_boxes(
    image: Image.Image, boxes: np.ndarray, classes: Sequence[int], labels: Sequence[str]
) -> Image.Image:
    """Draw labelled boxes on a copy of an image.

    Args:
        image: image of any mode.
        boxes: (T, 4) boxes, xyxy in pixels of ``image``; the last is drawn on top.
        classes: T class indices, which select the colours.
        labels: T texts; "" draws only the box.

    Returns:
        New RGB image of the same size.
    """
    picture = image.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 320))
    font = load_font(max(11, min(28, round(max(picture.size) / 45))))
    for box, index in zip(boxes, classes, strict=True):
        corners = _inside(box, picture.size)
        # A dark inner edge keeps boxes visible on a background of their own colour.
        canvas.rectangle(corners, outline="black", width=line + 1)
        canvas.rectangle(corners, outline=class_colour(index), width=line)
    # Labels are drawn after all boxes, so that no line crosses a text.
    for box, index, label in zip(boxes, classes, labels, strict=True):
        if label:
            _draw_label(canvas, _inside(box, picture.size), label, class_colour(index), font)
    return picture


def draw_masks(
    image: Image.Image, masks: Sequence[np.ndarray], classes: Sequence[int]
) -> Image.Image:
    """Tint objects on a copy of an image, with a line along their edges.

    Args:
        image: image of any mode.
        masks: T masks (H', W') bool; they are enlarged or reduced to the image. The last one is on
            top.
        classes: T class indices, which select the colours.

    Returns:
        New RGB image of the same size.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    for mask, index in zip(masks, classes, strict=True):
        resized = Image.fromarray(np.asarray(mask, dtype=bool)).resize(
            image.size, Image.Resampling.NEAREST
        )
        inside = np.array(resized, dtype=bool)
        colour = np.array(class_colour(index), dtype=np.float32)
        pixels[inside] = (1 - _TINT) * pixels[inside] + _TINT * colour
        framed = np.pad(inside, 1)
        core = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
        pixels[inside & ~core] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_segments(
    image: Image.Image, ids: np.ndarray, segments: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Image.Image:
    """Draw a panoptic segmentation: every segment tinted, with its name on it.

    Args:
        image: image of any mode.
        ids: (H', W') id of the segment of each pixel, 0 for none.
        segments: each with ``id`` and ``category_id``, an index into ``names``.
        names: of the classes, things and stuff.

    Returns:
        New RGB image of the same size.
    """
    masks = [ids == segment["id"] for segment in segments]
    classes = [segment["category_id"] for segment in segments]
    picture = draw_masks(image, masks, classes)
    canvas = ImageDraw.Draw(picture)
    font = load_font(max(11, min(28, round(max(picture.size) / 45))))
    scale = np.array([image.height, image.width]) / ids.shape
    for mask, index in zip(masks, classes, strict=True):
        if not mask.any():
            continue
        pixels = np.argwhere(mask)
        nearest = np.abs(pixels - np.median(pixels, axis=0)).sum(1).argmin()
        y, x = (pixels[nearest] * scale).round().astype(int).tolist()
        width = round(canvas.textlength(names[index], font=font))
        _draw_label(canvas, (x - width // 2, y, x, y), names[index], class_colour(index), font)
    return picture


def detection_labels(instances: "Instances", classes: ClassTable) -> list[str]:
    """Return ``name 0.87`` for each detection."""
    pairs = zip(instances.pred_classes.tolist(), instances.scores.tolist(), strict=True)
    return [f"{classes.names[index]} {score:.2f}" for index, score in pairs]


def draw_instances(image: Image.Image, instances: "Instances", classes: ClassTable) -> Image.Image:
    """Draw detections on an image, the one with the highest score on top, with masks if they have.

    Boxes and masks are scaled from ``instances.image_size`` to the size of ``image``.
    """
    kept = instances[instances.scores.argsort()]
    if kept.has("pred_masks"):
        image = draw_masks(image, decoded(kept.pred_masks), kept.pred_classes.tolist())
    height, width = instances.image_size
    scale = np.array([image.width / width, image.height / height] * 2)
    boxes = kept.pred_boxes.tensor.numpy() * scale
    return draw_boxes(image, boxes, kept.pred_classes.tolist(), detection_labels(kept, classes))


def draw_output(
    image: Image.Image, instances: "Instances", output: Mapping[str, Any], classes: ClassTable
) -> Image.Image:
    """Draw what a model returns for an image: its panoptic segmentation, or else its detections.

    Args:
        image: image of any mode.
        instances: the detections to draw, on the CPU.
        output: of the model.
        classes: classes of the model.
    """
    if "panoptic_seg" not in output:
        return draw_instances(image, instances, classes)
    ids, segments = output["panoptic_seg"]
    return draw_segments(image, ids.cpu().numpy(), segments, classes.names)


def decoded(masks: Any) -> list[np.ndarray]:
    """Masks (H, W) bool of predictions, which are a tensor or run-length encodings."""
    if hasattr(masks, "numpy"):
        return list(masks.numpy())
    from pycocotools import mask as mask_util

    return [mask_util.decode(runs).astype(bool) for runs in masks]


def to_picture(array: np.ndarray, input_format: str) -> Image.Image:
    """Convert an array (H, W, 3) in the channel order of a model into an RGB picture."""
    return Image.fromarray(
        np.ascontiguousarray(array[:, :, ::-1] if input_format == "BGR" else array)
    )


def _inside(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Round a box to pixels and clip it to the image."""
    limit = np.array([size[0] - 1, size[1] - 1] * 2)
    left, top, right, bottom = np.clip(np.round(np.nan_to_num(box)), 0, limit).astype(int).tolist()
    return left, top, max(left, right), max(top, bottom)


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    label: str,
    colour: Colour,
    font: Any,
) -> None:
    width = round(canvas.textlength(label, font=font)) + 4
    ascent, descent = font.getmetrics()
    height = ascent + descent
    picture_width = canvas.im.size[0]
    left = max(0, min(box[0], picture_width - width))
    top = box[1] - height if box[1] >= height else box[1]
    canvas.rectangle((left, top, left + width - 1, top + height - 1), fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    text = (0, 0, 0) if luminance > 140 else (255, 255, 255)
    canvas.text((left + 2, top), label, fill=text, font=font)
