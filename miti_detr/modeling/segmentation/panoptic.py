"""Panoptic segmentation: every pixel of an image belongs to one segment.

Q queries, K classes, M kept queries, h x w pixels of the image that entered the network.
Source: ``PostProcessPanoptic`` of facebookresearch/detr ``models/segmentation.py`` at 29901c5.
"""

from collections.abc import Collection
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SMALL_AREA = 4  # pixels; segments up to this area are removed


class Segment(TypedDict):
    """One segment, as Detectron2's evaluators and ``Visualizer`` take it.

    ``id`` is the value of its pixels, from 1; ``category_id`` a class in 0..K-1; ``area`` is in
    pixels of the output.
    """

    id: int
    isthing: bool
    category_id: int
    area: int


def confident_queries(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Choose the queries whose best class is an object, with a probability above a threshold.

    Args:
        logits: (Q, K+1).
        threshold: published: 0.85.

    Returns:
        The queries (M,) in ascending order, and their classes (M,).
    """
    scores, classes = logits.softmax(-1).max(-1)
    queries = ((classes != logits.shape[-1] - 1) & (scores > threshold)).nonzero()[:, 0]
    return queries, classes[queries]


def merge_panoptic(
    classes: Tensor, masks: Tensor, *, stuff: Collection[int], output: tuple[int, int]
) -> tuple[Tensor, list[Segment]]:
    """Give each pixel to the query with the largest mask logit.

    Queries of the same stuff class become one segment. Segments of at most 4 pixels are removed and
    their pixels given to the others, until none is left. As published, that does not merge stuff:
    the pixels of a query that was merged with another one may go to any segment.

    Args:
        classes: (M,) in 0..K-1.
        masks: logits (M, h, w), M >= 0, at the size of the image.
        stuff: classes that have one segment at most.
        output: size that the image becomes (height, width), by nearest neighbours.

    Returns:
        Ids (*output) int32, 0 where there is no segment (that is, if there is none at all), and the
        segments in the order of their ids.
    """
    labels: list[int] = classes.tolist()
    merged = [labels.index(c) if c in stuff else i for i, c in enumerate(labels)]
    owner, area = _owners(masks, torch.tensor(merged, device=masks.device), output)
    while len(masks) and (small := area <= SMALL_AREA).any():
        classes, masks = classes[~small], masks[~small]
        owner, area = _owners(masks, torch.arange(len(masks), device=masks.device), output)
    segments = [
        Segment(id=i, isthing=c not in stuff, category_id=c, area=a)
        for i, (c, a) in enumerate(zip(classes.tolist(), area.tolist(), strict=True), start=1)
    ]
    return owner, segments


def _owners(masks: Tensor, merged: Tensor, output: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Id of each pixel, and the area of each mask.

    Args:
        masks: logits (M, h, w).
        merged: (M,) the mask that gets the pixels of each.
        output: size of the result.
    """
    if not len(masks):
        empty = torch.zeros(output, dtype=torch.int32, device=masks.device)
        return empty, torch.zeros(0, dtype=torch.int64, device=masks.device)
    rows, columns = (
        _nearest(before, after).to(masks.device)
        for before, after in zip(masks.shape[1:], output, strict=True)
    )
    owner = merged[masks.argmax(0)][rows][:, columns]
    return (owner + 1).to(torch.int32), torch.bincount(owner.flatten(), minlength=len(masks))


def _nearest(before: int, after: int) -> Tensor:
    """Index that each pixel of a resized axis takes its value from.

    By PIL, as published: torch's interpolation rounds ties differently.
    """
    line = Image.fromarray(np.arange(before, dtype=np.int32)[None])
    resized = line.resize((after, 1), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)[0].astype(np.int64))
