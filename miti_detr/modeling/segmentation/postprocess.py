"""From mask logits to masks in the frame of the output.

M masks, h' x w' grid of the logits, frames are (height, width) in pixels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as mask_util
from torch import Tensor

Size = tuple[int, int]


def resize_logits(logits: Tensor, *, padded: Size, image: Size, output: Size) -> Tensor:
    """Resize logits bilinearly to the output frame, without the padding of their batch.

    Args:
        logits: (M, h', w') on the grid of the padded batch.
        padded: size of the padded batch.
        image: size of the image in its top left corner.
        output: size that the image becomes.

    Returns:
        (M, *output).
    """
    pixels = F.interpolate(logits[:, None], size=padded, mode="bilinear")
    pixels = pixels[..., : image[0], : image[1]]
    if image != output:
        pixels = F.interpolate(pixels, size=output, mode="bilinear")
    return pixels[:, 0]


def published_instance_masks(logits: Tensor, *, padded: Size, image: Size, output: Size) -> Tensor:
    """Compute masks as the published code does, which thresholds before the last resize.

    It is here to compare with published results; the model uses :func:`resize_logits`.

    Args:
        logits: (M, h', w') on the grid of the padded batch.
        padded: size of the padded batch.
        image: size of the image in its top left corner.
        output: size that the image becomes.

    Returns:
        (M, *output) bool.

    Source: ``PostProcessSegm`` of facebookresearch/detr ``models/segmentation.py`` at 29901c5.
    """
    pixels = F.interpolate(logits[:, None], size=padded, mode="bilinear")
    masks = (pixels.sigmoid() > 0.5)[..., : image[0], : image[1]]
    return F.interpolate(masks.float(), size=output, mode="nearest")[:, 0].to(torch.bool)


class RunLengthMasks:
    """Masks encoded by COCO's run lengths, as a field of ``Instances``.

    A sequence of ``{"size": [height, width], "counts": text}`` that can be indexed as a tensor can.
    """

    def __init__(self, runs: Iterable[dict[str, Any]]) -> None:
        """Take encoded masks."""
        self.runs = list(runs)

    @classmethod
    def encode(cls, masks: Tensor) -> "RunLengthMasks":
        """Encode masks (M, height, width) bool."""
        pixels = masks.permute(1, 2, 0).to("cpu", torch.uint8).numpy()
        runs = mask_util.encode(np.asfortranarray(pixels))
        return cls({**run, "counts": run["counts"].decode("ascii")} for run in runs)

    @staticmethod
    def cat(parts: Sequence["RunLengthMasks"]) -> "RunLengthMasks":
        """Join several fields, as ``Instances.cat`` does."""
        return RunLengthMasks(run for part in parts for run in part.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, item: int | slice | Tensor) -> Any:
        if not isinstance(item, Tensor):
            return RunLengthMasks(self.runs[item]) if isinstance(item, slice) else self.runs[item]
        if item.dtype == torch.bool:
            item = item.nonzero()[:, 0]
        return RunLengthMasks(self.runs[index] for index in item.tolist())
