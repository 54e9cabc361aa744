"""Ground truth and detections side by side on images of a data set (the paper's Figure 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw

from miti_detr.data.object_masks import SEGMENTS, object_masks, objects_of
from miti_detr.engine.predictor import Predictor
from miti_detr.files import replacing

from .classes import ClassTable, class_table
from .drawing import (
    draw_boxes,
    draw_masks,
    draw_output,
    draw_segments,
    load_font,
    resize_for_reading,
    to_picture,
)

CELL = 320  # longer side of an image in the grid, pixels
GAP = 8  # space between the two pictures of a pair, and around pairs, pixels
CAPTION = 22  # height of a line of text, pixels
PAIRS_PER_ROW = 2


def choose_images(count: int, total: int) -> list[int]:
    """Choose ``count`` evenly spread indices from 0 to total - 1, or all if there are fewer."""
    if count >= total:
        return list(range(total))
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def draw_detections(
    predictor: Predictor,
    dataset: str,
    path: Path,
    *,
    num_classes: int,
    images: int = 8,
    threshold: float = 0.5,
) -> None:
    """Write a PNG with pairs of ground truth (left) and detections (right).

    Args:
        predictor: the model.
        dataset: name in Detectron2's catalog.
        path: PNG file.
        num_classes: number of classes K of the model.
        images: number of images, spread evenly over the data set.
        threshold: lowest score of a detection that is drawn.

    Raises:
        ValueError: the data set is empty, or has a class that the model does not have.
        KeyError: the data set is not registered.
    """
    records = DatasetCatalog.get(dataset)
    if not records:
        raise ValueError(f"data set {dataset!r} has no images")
    # After loading, because Detectron2 reads the class names of most data sets only then.
    classes = class_table(dataset, num_classes)
    pairs = []
    for index in choose_images(images, len(records)):
        record = records[index]
        array = predictor.read(record["file_name"])
        record = {**record, "height": array.shape[0], "width": array.shape[1]}
        output = predictor.outputs([array])[0]
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= threshold]
        image, scale = resize_for_reading(
            to_picture(array, predictor.input_format), CELL, shrink=True
        )
        with_masks = instances.has("pred_masks")
        truth = draw_truth(image, scale, record, classes, with_masks=with_masks)
        name = Path(record["file_name"]).name
        pairs.append((truth, draw_output(image, instances, output, classes), name))
    title = f"{dataset}: ground truth (left), detections with score \u2265 {threshold:.3g} (right)"
    with replacing(path) as temporary:
        compose_pairs(pairs, title).save(temporary, format="PNG")


def compose_pairs(pairs: Sequence[tuple[Image.Image, Image.Image, str]], title: str) -> Image.Image:
    """Arrange pairs of pictures under a title, two pairs per row.

    Args:
        pairs: (left, right, caption); sides of pictures are at most ``CELL`` pixels.
        title: title, one line.

    Returns:
        RGB picture with white background.
    """
    rows = [pairs[start : start + PAIRS_PER_ROW] for start in range(0, len(pairs), PAIRS_PER_ROW)]
    heights = [max(max(pair[0].height, pair[1].height) for pair in row) for row in rows]
    pair_width = 2 * CELL + 3 * GAP
    title_width = round(load_font(15).getlength(title)) + 2 * GAP
    width = max(pair_width * min(len(pairs), PAIRS_PER_ROW), title_width)
    height = 2 * CAPTION + sum(heights) + len(rows) * (CAPTION + GAP)
    sheet = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((GAP, CAPTION // 2), title, fill="black", font=load_font(15))
    top = 2 * CAPTION
    for row, row_height in zip(rows, heights, strict=True):
        for column, (left, right, caption) in enumerate(row):
            x = column * pair_width + GAP
            canvas.text((x, top), caption, fill=(90, 90, 90), font=load_font(13))
            sheet.paste(left, (x + (CELL - left.width) // 2, top + CAPTION))
            sheet.paste(right, (x + CELL + GAP + (CELL - right.width) // 2, top + CAPTION))
        top += row_height + CAPTION + GAP
    return sheet


def draw_truth(
    image: Image.Image,
    scale: float,
    record: dict[str, Any],
    classes: ClassTable,
    *,
    with_masks: bool = False,
) -> Image.Image:
    """Draw the objects or segments of an image on it, without crowds.

    Args:
        image: picture.
        scale: factor from pixels of the file to pixels of ``image``.
        record: Detectron2's dataset dict; with masks, it needs ``height`` and ``width``.
        classes: classes of the model.
        with_masks: draw masks as well; of a panoptic record, masks and names without boxes.

    Raises:
        ValueError: an object has a class that the model does not have.
    """
    objects = [item for item in objects_of(record) if not item.get("iscrowd", 0)]
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in objects]
    indices = [item["category_id"] for item in objects]
    if indices and max(indices) >= len(classes.names):
        raise ValueError(
            f"{record['file_name']} has class {max(indices)}, but the model has only "
            f"{len(classes.names)} classes. Name the data set it was trained on with --dataset"
        )
    if with_masks:
        size = record["height"], record["width"]
        masks = object_masks(record, objects, T.TransformList([]), size).tensor.numpy()
        if SEGMENTS in record:
            ids = (masks * np.arange(1, len(masks) + 1)[:, None, None]).sum(0)
            segments = [{"id": i, "category_id": c} for i, c in enumerate(indices, start=1)]
            return draw_segments(image, ids, segments, classes.names)
        image = draw_masks(image, list(masks), indices)
    corners = np.array(boxes, dtype=float).reshape(-1, 4) * scale
    return draw_boxes(image, corners, indices, [classes.names[index] for index in indices])
