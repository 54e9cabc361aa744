"""Attention of a detector, mapped back to the image: per query, pixel, layer and head.

Models do not keep attention weights. They are computed here from the inputs of the attention
modules. DETR attends to cells of a feature grid, Deformable-DETR to points of several levels.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from miti_detr.engine.predictor import Predictor
from miti_detr.layers import DeformableAttention
from miti_detr.modeling import MitiDetr, SetPrediction
from miti_detr.modeling.deformable import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    EncodedPyramid,
    Pyramid,
)
from miti_detr.modeling.transformer import DecoderLayer, EncoderLayer
from miti_detr.rank import eager_evaluation

Point = tuple[float, float]

# (Deformable-DETR, stack) -> its layers and the name of their attention
_PARTS: dict[tuple[bool, str], tuple[type[nn.Module], str]] = {
    (False, "decoder"): (DecoderLayer, "multihead_attn"),
    (False, "encoder"): (EncoderLayer, "self_attn"),
    (True, "decoder"): (DeformableDecoderLayer, "cross_attn"),
    (True, "encoder"): (DeformableEncoderLayer, "self_attn"),
}


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one model on one image; L layers, h x w un-padded cells of its feature grid.

    Attributes:
        queries: the detections of the chosen queries in decreasing order of score, with boxes in
            pixels of the image. The field ``query`` holds the indices of the queries.
        decoder: (queries, L, heads, h, w) attention of these queries; each map sums to 1. Of a
            Deformable-DETR (queries, L, heads, points, 3): x and y in pixels of the image, and
            weight, which sums to 1 over the points of all levels.
        pixels: chosen positions (x, y) in the image.
        encoder: (pixels, L, heads, h, w) attention of the cells at these positions, or points; the
            cells of a Deformable-DETR are those of its first level.
        extent: height and width of the image in cells. The last row and column of cells may extend
            beyond the image.
        points: attention is given as points.
    """

    queries: Instances
    decoder: Tensor
    pixels: list[Point]
    encoder: Tensor
    extent: tuple[float, float]

    points: bool = False


def attention_maps(
    predictor: Predictor,
    image: np.ndarray,
    *,
    num_queries: int = 4,
    pixels: Sequence[Point] | None = None,
) -> AttentionMaps:
    """Run a detector on one image and compute its attention maps.

    Args:
        predictor: predictor with a :class:`MitiDetr` whose transformer has the layers of this
            package.
        image: (H, W, 3) image, as for the predictor.
        num_queries: number of queries, those with the highest scores.
        pixels: positions (x, y) in the image; None uses the centres of the boxes of these queries.

    Raises:
        ValueError: the model is of another class, or a position is outside the image.
    """
    model = predictor.model
    if not isinstance(model, MitiDetr):
        raise ValueError(f"attention maps need a MitiDetr, not a {type(model).__name__}")
    height, width = image.shape[:2]
    for x, y in pixels or ():
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(f"pixel {x:g},{y:g} is outside the image of {width} x {height}")
    inputs = predictor.prepare(image)
    with eager_evaluation(model):
        images = model.preprocess_image([inputs])
        encoded = model.encode(images)
        object_queries = model.embed_queries([inputs])
        deformable = isinstance(encoded, EncodedPyramid)
        with recorded_attention(model, *_PARTS[deformable, "decoder"]) as decoder:
            decoded = model.decode(encoded, object_queries)
        prediction = model.apply_heads(encoded, decoded.last())
        size = images.image_sizes[0]
        shown = _best_queries(model, prediction, size, num_queries)
        shown = _in_image(shown, height, width)
        chosen = list(pixels) if pixels is not None else _centres(shown)
        feature = model.backbone.in_features[0 if deformable else -1]
        stride = model.backbone.strides[feature]
        scale = (size[1] / width / stride, size[0] / height / stride)  # cells per pixel, x and y
        grid = _Grid(encoded.features[feature].mask[0])
        tokens = torch.tensor([grid.token(x * scale[0], y * scale[1]) for x, y in chosen])
        with recorded_attention(model, *_PARTS[deformable, "encoder"], tokens) as encoder:
            model.decode(encoded, object_queries)
    read = grid.maps
    if isinstance(encoded, EncodedPyramid):
        read = _Points(encoded.pyramid, height, width).read
    return AttentionMaps(
        queries=shown,
        decoder=read([weights[:, shown.query] for weights in decoder], len(shown)),
        pixels=chosen,
        encoder=read(encoder, len(tokens)),
        extent=(size[0] / stride, size[1] / stride),
        points=deformable,
    )


@contextlib.contextmanager
def recorded_attention(
    model: nn.Module, layer_class: type[nn.Module], part: str, rows: Tensor | None = None
) -> Iterator[list[Tensor]]:
    """While entered, record the attention weights of each layer of a class.

    Args:
        model: model, to be run once inside.
        layer_class: class of the encoder or decoder layers.
        part: name of the attribute that is their attention.
        rows: (R,) indices of the queries to compute; None computes all.

    Yields:
        The weights (heads, R, Lk) of the first image for each layer, in the order in which layers
        run. Of deformable attention (heads, R, levels, points, 3): location in [0, 1] of the padded
        level, and weight.
    """
    recorded: list[Tensor] = []

    def chosen(x: Tensor) -> Tensor:
        return x[:1] if rows is None else x[:1, rows.to(x.device)]

    def keep(attention: Any, args: tuple[Any, ...]) -> None:
        if isinstance(attention, DeformableAttention):
            query, references, _, shapes, *_ = args
            points, weights = attention.sampling_points(chosen(query), chosen(references), shapes)
            found = torch.cat([points, weights[..., None].to(points.dtype)], dim=-1)
            recorded.append(found[0].transpose(0, 1).float().cpu())
            return
        query, key, _, *rest = args
        mask = rest[0][:1] if rest and rest[0] is not None else None
        recorded.append(attention.weights(chosen(query), key[:1], mask)[0].float().cpu())

    layers = [m for m in model.modules() if isinstance(m, layer_class)]
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            attention: Any = getattr(layer, part)
            hooks.callback(attention.register_forward_pre_hook(keep).remove)
        yield recorded


class _Grid:
    """The cells of the feature grid that are not padding."""

    def __init__(self, padding: Tensor) -> None:
        """Take the padding mask (h, w) of one image."""
        self.shape = tuple(padding.shape)
        self.rows = int((~padding).any(dim=1).sum())
        self.columns = int((~padding).any(dim=0).sum())

    def token(self, x: float, y: float) -> int:
        """Return the index of the cell at a position in cells."""
        row, column = min(int(y), self.rows - 1), min(int(x), self.columns - 1)
        return row * self.shape[1] + column

    def maps(self, layers: Sequence[Tensor], count: int) -> Tensor:
        """Return the weights (heads, count, n) of L layers as (count, L, heads, rows, columns)."""
        if not layers:
            return torch.zeros(count, 0, 1, self.rows, self.columns)
        maps = torch.stack(list(layers)).permute(2, 0, 1, 3).unflatten(-1, self.shape)
        return maps[..., : self.rows, : self.columns]


class _Points:
    """Locations on levels, as pixels of the image."""

    def __init__(self, pyramid: Pyramid, height: int, width: int) -> None:
        """Take the levels of a batch of one image and the size of the image in pixels."""
        self.scale = torch.tensor([width, height]) / pyramid.valid_ratios[0].cpu()  # (levels, 2)

    def read(self, layers: Sequence[Tensor], count: int) -> Tensor:
        """Return (heads, count, levels, points, 3) of L layers as (count, L, heads, K, 3)."""
        if not layers:
            return torch.zeros(count, 0, 1, 1, 3)
        found = torch.stack(list(layers)).permute(2, 0, 1, 3, 4, 5)
        pixels = found[..., :2] * self.scale[:, None]
        return torch.cat([pixels, found[..., 2:]], dim=-1).flatten(3, 4)


def _best_queries(
    model: MitiDetr, prediction: SetPrediction, size: tuple[int, int], count: int
) -> Instances:
    """The best detection of each of the ``count`` best queries, by decreasing score."""
    found = model.read_detections(prediction, [size])[0].to("cpu")
    found.query = model.read_classes(prediction.logits[-1]).queries[0].cpu()
    best: dict[int, int] = {}  # query -> index of its best detection
    for index in found.scores.argsort(descending=True).tolist():
        best.setdefault(int(found.query[index]), index)
    return found[torch.tensor(list(best.values())[:count], dtype=torch.int64)]


def _in_image(instances: Instances, height: int, width: int) -> Instances:
    """Return detections in pixels of the image; empty boxes stay, to keep the order of queries."""
    scale = torch.tensor([width / instances.image_size[1], height / instances.image_size[0]] * 2)
    result = Instances((height, width), **instances.get_fields())
    result.pred_boxes = Boxes(instances.pred_boxes.tensor * scale)
    result.pred_boxes.clip((height, width))
    return result


def _centres(instances: Instances) -> list[Point]:
    height, width = instances.image_size
    centres = instances.pred_boxes.get_centers().tolist()
    return [(min(x, width - 1), min(y, height - 1)) for x, y in centres]
