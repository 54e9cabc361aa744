"""Rows of class heads: by COCO category id, as published, and contiguous, as in Detectron2.

A class head is a linear layer of C inputs with one row a class and, except for focal loss, a last
one for "no object". Rows by id are 91 for objects (of which 80 are in use) and 250 for panoptic
segmentation (133). Deformable-DETR has several heads.
"""

import re
from collections.abc import Iterable

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

KEYS = ("class_embed.weight", "class_embed.bias")
COCO_CLASSES = 80
NO_OBJECT_ID = 91
# Number of contiguous classes -> number of rows by id without no-object, id of each class
COCO_IDS: dict[int, tuple[int, tuple[int, ...]]] = {
    COCO_CLASSES: (NO_OBJECT_ID, tuple(c["id"] for c in COCO_CATEGORIES if c["isthing"])),
    133: (250, tuple(c["id"] for c in COCO_CATEGORIES)),
}
NEVER = -1e4  # bias of a row that must not win: exp(-1e4) is 0 in every float type

_HEAD = re.compile(r"(detr\.)?class_embed\.(\d+\.)?(weight|bias)")


def keys_in(state: Iterable[str]) -> tuple[str, ...]:
    """Keys of class heads among those of a state dict."""
    return tuple(key for key in state if _HEAD.fullmatch(key))


def coco_classes(rows: int, *, no_object: bool = True) -> int | None:
    """Return the number of contiguous classes of a head of ``rows`` rows by COCO id, or None.

    With ``no_object``, its row may be missing.
    """
    fits = (n for n, (last, _) in COCO_IDS.items() if rows in (last, last + no_object))
    return next(fits, None)


def select_coco_rows(tensor: Tensor, *, no_object: bool = True) -> Tensor:
    """Reduce a head by COCO id to Detectron2's contiguous classes and no-object.

    Logits of kept classes stay equal; scores do not quite, the softmax having fewer terms.

    Args:
        tensor: weight (92 or 251, C) or bias. With one row fewer there is none for no-object: that
            row is then 0.
        no_object: the head has such a row.

    Returns:
        (81 or 134, C) or a bias, without no-object one row fewer; a new tensor.
    """
    last, ids = COCO_IDS[coco_classes(len(tensor), no_object=no_object) or 0]
    if not no_object:
        return tensor[[*ids]]
    if len(tensor) == last:
        tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
    return tensor[[*ids, last]]


def expand_coco_rows(tensor: Tensor) -> Tensor:
    """Undo :func:`select_coco_rows`: rows without a class get weight 0 and bias -1e4.

    Args:
        tensor: weight (81 or 134, C) or a bias, or one row fewer without no-object.

    Returns:
        (92 or 251, C) or a bias, without no-object one row fewer; a new tensor.
    """
    classes = len(tensor) if len(tensor) in COCO_IDS else len(tensor) - 1
    last, ids = COCO_IDS[classes]
    rows = [*ids, last][: len(tensor)]
    shape = (last + len(rows) - classes, *tensor.shape[1:])
    full = torch.full(shape, NEVER if tensor.dim() == 1 else 0.0, dtype=tensor.dtype)
    full[rows] = tensor
    return full
