"""Attention maps laid over the image, as sheets of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from miti_detr.engine.predictor import Predictor
from miti_detr.files import replacing

from .attention import AttentionMaps, Point, attention_maps
from .classes import ClassTable
from .detections import GAP
from .drawing import Colour, class_colour, load_font, resize_for_reading, to_picture

CELL = 150  # longer side of a map in a sheet, pixels
DOT = 1.5  # radius of a sampling point, pixels
LINE = 18  # height of a line of text, pixels
HEAT = colormaps["inferno"]
PIXEL_COLOUR: Colour = (0, 190, 255)
SCALE = "each map ranges from 0 (dark) to its own maximum (bright)"
AVERAGED = "averaged over the heads, or the points of all heads"

# (name of the model, its maps)
Side = tuple[str, AttentionMaps]


@dataclass(frozen=True)
class _Row:
    """One query or pixel: its maps (L, heads, h, w), and its mark in pixels of the image.

    With ``points`` the maps are (L, heads, K, 3): x, y and weight.
    """

    title: str
    maps: Tensor
    extent: tuple[float, float]
    colour: Colour
    mark: tuple[float, ...]  # a box xyxy, or a point xy
    points: bool

    def over_heads(self) -> list[Tensor]:
        """For each layer the mean of the maps of all heads, or the points of all heads."""
        return [m.flatten(0, 1) if self.points else m.mean(dim=0) for m in self.maps]


def draw_attention(
    models: Sequence[tuple[str, Predictor]],
    path: Path,
    folder: Path,
    *,
    classes: ClassTable,
    num_queries: int = 4,
    pixels: Sequence[Point] | None = None,
) -> list[Path]:
    """Write the attention sheets of :func:`write_sheets` for one image and several models.

    Args:
        models: name and predictor of each model.
        path: image file.
        folder: folder for the pictures.
        classes: class names for the titles.
        num_queries: number of queries per model, those with the highest scores.
        pixels: positions (x, y) in the image, the same for all models; None uses the centres of
            the boxes of the first model's queries.

    Returns:
        The files written.
    """
    sides: list[Side] = []
    for name, predictor in models:
        array = predictor.read(path)
        maps = attention_maps(predictor, array, num_queries=num_queries, pixels=pixels)
        pixels = maps.pixels
        sides.append((name, maps))
    picture = to_picture(array, predictor.input_format)
    return write_sheets(sides, picture, classes, folder, path.stem)


def write_sheets(
    sides: Sequence[Side], image: Image.Image, classes: ClassTable, folder: Path, stem: str
) -> list[Path]:
    """Write the pictures of one image, with all models side by side.

    ``<stem>_decoder.png`` and ``<stem>_encoder.png`` have a row per query (pixel) and a column per
    layer, averaged over the heads. ``<stem>_decoder_1.png``, ``<stem>_encoder_1.png`` and so on
    show one query (pixel), with layers as rows and heads as columns.

    Args:
        sides: models, from left to right.
        image: RGB image whose pixels the maps refer to.
        classes: class names for the titles.
        folder: folder, created if missing.
        stem: beginning of the file names.

    Returns:
        The files written.
    """
    sheets: dict[str, Image.Image] = {}
    for kind, read in (("decoder", _query_rows), ("encoder", _pixel_rows)):
        rows = [(name, read(maps, classes)) for name, maps in sides]
        blocks = [_overview(name, found, image) for name, found in rows]
        sheets[kind] = _beside(blocks, f"{kind}, {AVERAGED}; {SCALE}")
        for index in range(max(len(found) for _, found in rows)):
            blocks = [_heads(name, r[index], image) for name, r in rows if index < len(r)]
            title = f"{kind}: one row per layer, one column per head; {SCALE}"
            sheets[f"{kind}_{index + 1}"] = _beside(blocks, title)
    files = []
    for name, sheet in sheets.items():
        files.append(folder / f"{stem}_{name}.png")
        with replacing(files[-1]) as temporary:
            sheet.save(temporary, format="PNG")
    return files


def _query_rows(maps: AttentionMaps, classes: ClassTable) -> list[_Row]:
    queries = maps.queries
    rows = []
    for index in range(len(queries)):
        label, score = int(queries.pred_classes[index]), float(queries.scores[index])
        title = f"query {int(queries.query[index])}: {classes.names[label]} {score:.2f}"
        box = tuple(queries.pred_boxes.tensor[index].tolist())
        shown = (maps.decoder[index], maps.extent, class_colour(label), box, maps.points)
        rows.append(_Row(title, *shown))
    return rows


def _pixel_rows(maps: AttentionMaps, classes: ClassTable) -> list[_Row]:
    return [
        _Row(f"pixel {x:.0f}, {y:.0f}", found, maps.extent, PIXEL_COLOUR, (x, y), maps.points)
        for (x, y), found in zip(maps.pixels, maps.encoder, strict=True)
    ]


def _overview(name: str, rows: Sequence[_Row], image: Image.Image) -> Image.Image:
    """Draw a row per query or pixel: the marked image, then the mean of the heads per layer."""
    thumb, _ = resize_for_reading(image, CELL, shrink=True)
    cells = []
    for row in rows:
        pictures = [_paint(thumb, row, image, layer) for layer in row.over_heads()]
        cells.append((row.title, [_marked(thumb, row, image), *pictures]))
    layers = len(rows[0].maps) if rows else 0
    return _table(name, ["", *(f"layer {i}" for i in range(1, layers + 1))], cells, thumb.size)


def _heads(name: str, row: _Row, image: Image.Image) -> Image.Image:
    """Draw all layers and heads of one query or pixel."""
    thumb, _ = resize_for_reading(image, CELL, shrink=True)
    cells = [
        (f"layer {index}", [_paint(thumb, row, image, head) for head in layer])
        for index, layer in enumerate(row.maps, start=1)
    ]
    headers = [f"head {i}" for i in range(1, row.maps.shape[1] + 1)]
    return _table(f"{name}, {row.title}", headers, cells, thumb.size)


def heat_picture(weights: Tensor, extent: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """Resize a map of cells to a picture.

    Args:
        weights: (h, w) weights of the cells.
        extent: height and width of the picture in cells; cells beyond it are cut off.
        size: width and height of the picture in pixels.

    Returns:
        (height, width) weights relative to the largest one.
    """
    width, height = size
    full = [
        round(n / e * p) for n, e, p in zip(weights.shape, extent, (height, width), strict=True)
    ]
    full = [max(full[0], height), max(full[1], width)]
    stretched = F.interpolate(weights[None, None], full, mode="bilinear", align_corners=False)
    cut = stretched[0, 0, :height, :width].numpy()
    return cut / max(float(weights.max()), np.finfo(np.float32).tiny)


def _paint(thumb: Image.Image, row: _Row, image: Image.Image, weights: Tensor) -> Image.Image:
    if row.points:
        return _marked(_dotted(thumb, weights, thumb.width / image.width), row, image)
    heat = HEAT(heat_picture(weights, row.extent, thumb.size))[..., :3] * 255
    grey = np.asarray(thumb.convert("L"), dtype=float)[..., None]
    return _marked(Image.fromarray((0.3 * grey + 0.7 * heat).astype(np.uint8)), row, image)


def _dotted(thumb: Image.Image, points: Tensor, scale: float) -> Image.Image:
    """Draw points (K, 3) on a grey picture, the heavier the brighter and the later."""
    picture = Image.fromarray((np.asarray(thumb.convert("L")) * 0.6).astype(np.uint8))
    picture = picture.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    brightest = max(float(points[:, 2].max()), np.finfo(np.float32).tiny)
    for x, y, weight in points[points[:, 2].argsort()].tolist():
        red, green, blue, _ = HEAT(weight / brightest, bytes=True)
        centre = (x * scale, y * scale)
        box = [value + side for side in (-DOT, DOT) for value in centre]
        canvas.ellipse(box, fill=(int(red), int(green), int(blue)))
    return picture


def _marked(picture: Image.Image, row: _Row, image: Image.Image) -> Image.Image:
    result = picture.copy()
    scale = (picture.width / image.width, picture.height / image.height)
    canvas = ImageDraw.Draw(result)
    mark = [value * scale[index % 2] for index, value in enumerate(row.mark)]
    if len(mark) == 4:
        corners = (mark[0], mark[1], max(mark[2] - 1, mark[0]), max(mark[3] - 1, mark[1]))
        canvas.rectangle(corners, outline=row.colour, width=2)
    else:
        x, y = mark
        canvas.line((x - 6, y, x + 6, y), fill=row.colour, width=2)
        canvas.line((x, y - 6, x, y + 6), fill=row.colour, width=2)
    return result


def _table(
    title: str,
    headers: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    size: tuple[int, int],
) -> Image.Image:
    """Arrange pictures of one size in titled rows below a title and headers."""
    width, height = size
    sheet_size = (
        max(len(headers) * (width + GAP), round(load_font(14).getlength(title))),
        2 * LINE + len(rows) * (LINE + height + GAP),
    )
    sheet = Image.new("RGB", sheet_size, "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((0, 0), title, fill="black", font=load_font(14))
    for column, header in enumerate(headers):
        canvas.text((column * (width + GAP), LINE), header, fill=(90, 90, 90), font=load_font(12))
    for index, (text, pictures) in enumerate(rows):
        top = 2 * LINE + index * (LINE + height + GAP)
        canvas.text((0, top), text, fill=(90, 90, 90), font=load_font(12))
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (column * (width + GAP), top + LINE))
    return sheet


def _beside(blocks: Sequence[Image.Image], title: str) -> Image.Image:
    """Arrange blocks from left to right below a title."""
    between = 4 * GAP
    width = sum(block.width for block in blocks) + between * (len(blocks) - 1)
    title_width = round(load_font(15).getlength(title))
    height = max(block.height for block in blocks)
    size = (max(width, title_width) + 2 * GAP, height + 2 * LINE + 2 * GAP)
    sheet = Image.new("RGB", size, "white")
    ImageDraw.Draw(sheet).text((GAP, GAP), title, fill="black", font=load_font(15))
    left = GAP
    for block in blocks:
        sheet.paste(block, (left, GAP + 2 * LINE))
        left += block.width + between
    return sheet
