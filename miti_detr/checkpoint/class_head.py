"""Rows of class heads: by COCO category id (91) and contiguous (80, Detectron2).

A class head is a linear layer of C inputs with one row a class and, but for focal loss, one more
for "no object". Deformable-DETR has several heads.
"""

import re
from collections.abc import Iterable

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

KEYS = ("class_embed.weight", "class_embed.bias")
COCO_CLASSES = 80
COCO_IDS = tuple(c["id"] for c in COCO_CATEGORIES if c["isthing"])  # contiguous class -> id
NO_OBJECT_ID = 91  # rows are category ids 0..90, of which 80 are in use, then no-object
NEVER = -1e4  # bias of a row that must not win: exp(-1e4) is 0 in every float type


_HEAD = re.compile(r"class_embed\.(\d+\.)?(weight|bias)")


def keys_in(state: Iterable[str]) -> tuple[str, ...]:
    """Keys of class heads among those of a state dict."""
    return tuple(key for key in state if _HEAD.fullmatch(key))


def coco_rows(rows: int, num_classes: int | None, *, no_object: bool = True) -> bool:
    """Tell whether a head of ``rows`` rows holds the K = ``num_classes`` classes by COCO id."""
    fits = (NO_OBJECT_ID, NO_OBJECT_ID + 1) if no_object else (NO_OBJECT_ID,)
    return num_classes in (None, COCO_CLASSES) and rows in fits


def select_coco_rows(tensor: Tensor, *, no_object: bool = True) -> Tensor:
    """Reduce a head by COCO id to Detectron2's 80 classes and no-object.

    Logits of kept classes stay equal; scores do not quite, the softmax having fewer terms.

    Args:
        tensor: weight (92, C) or bias (92,). With 91 rows there is none for no-object: that row
            is then 0.
        no_object: the head has such a row.

    Returns:
        (81, C) or (81,), without no-object 80 rows; a new tensor.
    """
    if not no_object:
        return tensor[[*COCO_IDS]]
    if len(tensor) == NO_OBJECT_ID:
        tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
    return tensor[[*COCO_IDS, NO_OBJECT_ID]]


def expand_coco_rows(tensor: Tensor) -> Tensor:
    """Undo :func:`select_coco_rows`: rows without a class get weight 0 and bias -1e4.

    Args:
        tensor: weight (81, C) or bias (81,), or 80 rows without no-object.

    Returns:
        (92, C) or (92,), without no-object 91 rows; a new tensor.
    """
    rows = [*COCO_IDS, NO_OBJECT_ID][: len(tensor)]
    shape = (NO_OBJECT_ID + len(rows) - COCO_CLASSES, *tensor.shape[1:])
    full = torch.full(shape, NEVER if tensor.dim() == 1 else 0.0, dtype=tensor.dtype)
    full[rows] = tensor
    return full
