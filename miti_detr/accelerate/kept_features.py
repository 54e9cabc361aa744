"""Batches of features that the backbone has computed before, instead of images.

A frozen backbone gives the same features in each pass over the data.
``MODEL.BACKBONE.CACHE_FEATURES`` keeps them in files (``data/kept_features.py``), of which batches
are made here.

How exact: convolutions see the padding of a batch, but not that of these features, so images of
several sizes do not give exactly the features that they have in a batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor


class KeptFeatures(ImageList):
    """A batch whose features were computed before, of images that are not there.

    Attributes:
        tensor: (N, 3, H, W) without data.
        features: (N, C', h, w) by name.
    """

    features: dict[str, Tensor]


def batch_of_features(
    batched_inputs: Sequence[Mapping[str, Any]], strides: Mapping[str, int], *, like: Tensor
) -> KeptFeatures:
    """Pad features of single images to one size.

    Args:
        batched_inputs: for each image ``features``, which are (C', h, w) by name, as the backbone
            computes them for this image, and ``size``, its height and width in pixels.
        strides: of the features to take, in pixels per cell.
        like: the batch gets the type and device of this tensor.
    """
    features = [
        {name: x["features"][name].to(like, non_blocking=True) for name in strides}
        for x in batched_inputs
    ]
    sizes = [tuple(x["size"]) for x in batched_inputs]
    *_, (last, stride) = strides.items()
    shapes = [each[last].shape[-2:] for each in features]
    height, width = (stride * max(sides) for sides in zip(*shapes, strict=True))
    batch = KeptFeatures(torch.empty(len(sizes), 3, height, width, device="meta"), sizes)
    batch.features = {
        name: torch.stack([_pad(x[name], height // step, width // step) for x in features])
        for name, step in strides.items()
    }
    return batch


def _pad(feature: Tensor, height: int, width: int) -> Tensor:
    return F.pad(feature, (0, width - feature.shape[-1], 0, height - feature.shape[-2]))
