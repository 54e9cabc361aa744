"""State dicts of other implementations to ours and back: pure functions, no files."""

import dataclasses
import difflib
import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from . import class_head
from .deformable import KEY as DEFORMABLE_KEY
from .deformable import check_deformable, merge_heads, spread_heads
from .errors import CheckpointError
from .sources import (
    BACKBONE_SOURCES,
    FOCAL_SOURCES,
    MASK_KEY,
    MASK_ONLY,
    PRETRAINING_KEY,
    PRETRAINING_ONLY,
    SOURCES,
    Source,
)
from .tables import Row, pattern_regex

StateDict = dict[str, Tensor]
PRE_NORM_KEY = "transformer.encoder.norm.weight"


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What happened to a state dict.

    Attributes:
        source: key of :data:`SOURCES`.
        mapped: number of source tensors that went into the result.
        dropped: source keys left out on purpose.
        reinitialised: our keys that the source does not fit, so that the model's own values stay.
        notes: further changes of values, such as the choice of class rows.
        pre_norm: whether the weights are of a pre-norm transformer; None if they hold none.
    """

    source: str
    mapped: int
    dropped: tuple[str, ...] = ()
    reinitialised: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pre_norm: bool | None = None

    def summary(self) -> str:
        """Say it in one line."""
        parts = (
            f"recognised {SOURCES[self.source].label}: {self.mapped} tensors mapped",
            _listed(self.dropped, "dropped"),
            _listed(self.reinitialised, "re-initialised"),
            *self.notes,
        )
        return "; ".join(part for part in parts if part)


def recognise(state_dict: Mapping[str, object]) -> str | None:
    """Name the format of a state dict by its keys.

    Returns:
        A key of :data:`SOURCES`, or None.
    """
    for name, source in SOURCES.items():
        if any(key.startswith(source.signature) for key in state_dict):
            return name
    return None


def convert_state_dict(
    state_dict: Mapping[str, Tensor | np.ndarray],
    *,
    num_classes: int | None,
    source: str | None = None,
    pretraining: bool = False,
    no_object: bool | None = None,
    masks: bool = False,
) -> tuple[StateDict, ConversionReport]:
    """Convert a state dict to the keys of ``MitiDetr``.

    Args:
        state_dict: tensors or arrays by key; left as it is.
        num_classes: K of the model. A class head by COCO id is reduced to contiguous classes;
            another number of rows than the model's leaves the head out. None: as in the source.
        source: key of :data:`SOURCES`; None: recognised by the keys.
        pretraining: the model is an ``UpDetr``. Another one takes over the weights of UP-DETR
            pre-training without its class head, patch projection and feature head.
        no_object: the class head of the model has a last row for "no object", as softmax needs
            and focal loss does not. None: as in the source.
        masks: keep the weights of a mask head, if the source has one.

    Returns:
        The new state dict, in the order of the source, and what was done.

    Raises:
        ValueError: if ``source`` is none of the names.
        CheckpointError: if no format is recognised, or a key is not in its table.
    """
    if source is not None and source not in SOURCES:
        raise ValueError(f"source {source!r} is not one of {', '.join(SOURCES)}")
    source = source or recognise(state_dict)
    if source is None:
        raise CheckpointError(_unrecognised(state_dict))
    label, _, rows = SOURCES[source]
    tensors = {key: torch.as_tensor(value) for key, value in state_dict.items()}
    result, dropped = _apply(rows, tensors, label, aliases=source in FOCAL_SOURCES)
    if source in FOCAL_SOURCES:
        dropped += merge_heads(result, refined=any("decoder.bbox_embed." in k for k in tensors))
    pretrained = PRETRAINING_KEY in result and not pretraining
    unused = (PRETRAINING_ONLY if pretrained else ()) + (() if masks else MASK_ONLY)
    left = tuple(key for key in result if key.startswith(unused))
    dropped += left
    for key in left:
        del result[key]
    reinitialised, notes = _fit_class_head(result, source, num_classes, no_object)
    mapped = len(tensors) - len(dropped) - len(reinitialised)
    if pretrained:
        reinitialised = class_head.KEYS
        if source == "ours":  # the label does not say it
            notes += ("weights of UP-DETR pre-training",)
    return result, ConversionReport(
        source=source,
        mapped=mapped,
        dropped=dropped,
        reinitialised=reinitialised,
        notes=notes,
        pre_norm=None if source in BACKBONE_SOURCES else PRE_NORM_KEY in result,
    )


def to_official(state_dict: Mapping[str, Tensor], *, num_classes: int | None = None) -> StateDict:
    """Convert our state dict to the keys of the published DETR, Miti-DETR or Deformable-DETR.

    Args:
        state_dict: of a ``MitiDetr``, with or without masks, or of a ``DeformableDetr``, with a
            ResNet of Detectron2.
        num_classes: 80 or 133 keeps a head of as many classes as it is; None, 91 or 250 writes it
            by COCO id, with weight 0 and bias -1e4 for ids that are not in use. Heads of other
            sizes are kept.

    Raises:
        CheckpointError: for keys that the published models do not have.
    """
    deformable, masks = DEFORMABLE_KEY in state_dict, MASK_KEY in state_dict
    name = "deformable_detr" if deformable else "detr_panoptic" if masks else "detr"
    source = SOURCES[name]
    result = _reverse(state_dict, source)
    for key in class_head.keys_in(result):
        by_id, _ = class_head.COCO_IDS.get(len(result[key]) - (not deformable), (0, ()))
        if by_id and num_classes in (None, by_id):
            result[key] = class_head.expand_coco_rows(result[key])
    if deformable:
        result |= spread_heads(result, "transformer.decoder.")
    return result


def to_d2_wrapper(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert our state dict to the keys of the published Detectron2 wrapper of DETR.

    Its ``criterion.empty_weight`` is left out, as its own converter does.

    Raises:
        CheckpointError: for keys that the wrapper does not have.
    """
    check_deformable(state_dict, "the Detectron2 wrapper of DETR")
    source = SOURCES["d2_wrapper_panoptic" if MASK_KEY in state_dict else "d2_wrapper"]
    return _reverse(state_dict, source)


def reverse_huggingface(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Convert our state dict to Hugging Face keys (4.x names, timm backbone), projections split.

    Raises:
        CheckpointError: for keys that Hugging Face's DETR and Deformable-DETR do not have.
    """
    deformable = DEFORMABLE_KEY in state_dict
    plain = "hf_panoptic" if MASK_KEY in state_dict else "hf"
    source = SOURCES["hf_deformable" if deformable else plain]
    result = _reverse(state_dict, source)
    if deformable:  # copies: a file of safetensors cannot have a tensor twice
        more = spread_heads(result, "model.decoder.")
        result |= {key: value.clone() for key, value in more.items()}
    return result


def _listed(keys: tuple[str, ...], what: str) -> str:
    """Say which keys, a few of them by name."""
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return f"{len(keys)} {what} ({shown})" if keys else ""


def _apply(
    rows: tuple[Row, ...], tensors: StateDict, label: str, *, aliases: bool
) -> tuple[StateDict, tuple[str, ...]]:
    """Rename by the table; pack what comes in parts; with ``aliases`` drop what comes twice."""
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    dropped = []
    for key, tensor in tensors.items():
        row, match = _find(rows, key, label)
        if row.ours is None:
            dropped.append(key)
            continue
        ours = row.ours.format(**match.groupdict())
        if ours in result and row.part is None:
            if not aliases or not torch.equal(result[ours], tensor):
                raise CheckpointError(f"two keys stand for {ours}, one of them {key!r}")
            dropped.append(key)
        elif row.part is None:
            result[ours] = tensor
        else:
            parts.setdefault(ours, {})[row.part] = tensor
            result[ours] = tensor  # keeps the place in the order; packed below
    for ours, thirds in parts.items():
        if len(thirds) < 3:
            raise CheckpointError(f"{ours} needs query, key and value; {len(thirds)} of 3 given")
        result[ours] = torch.cat([thirds[part] for part in range(3)])
    return result, tuple(dropped)


def _find(rows: tuple[Row, ...], key: str, label: str) -> tuple[Row, re.Match[str]]:
    for row in rows:
        match = pattern_regex(row.theirs).fullmatch(key)
        if match:
            return row, match
    near = difflib.get_close_matches(key, [row.theirs for row in rows], n=3, cutoff=0.5)
    hint = f"; the nearest known ones are {', '.join(near)}" if near else ""
    raise CheckpointError(f"recognised as {label}, which has no key {key!r}{hint}")


def _reverse(state_dict: Mapping[str, Tensor], source: Source) -> StateDict:
    """Read a table from right to left, by the first row (or three of parts) that fits."""
    result: StateDict = {}
    for key, tensor in state_dict.items():
        fits = [
            (row, match)
            for row in source.rows
            if row.ours is not None and (match := pattern_regex(row.ours).fullmatch(key))
        ]
        if not fits:
            raise CheckpointError(f"{key!r} has no counterpart in {source.label}")
        for row, match in fits[: 1 if fits[0][0].part is None else 3]:
            theirs = row.theirs.format(**match.groupdict())
            part = tensor if row.part is None else tensor.chunk(3)[row.part].clone()
            result[theirs] = part.contiguous()  # ours may be channels_last; safetensors refuses it
    return result


def _fit_class_head(
    result: StateDict, source: str, num_classes: int | None, no_object: bool | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose the class rows in place; return what is left out, and what was chosen."""
    present = class_head.keys_in(result)
    if not present:
        return (), ()
    # Rows by COCO id are those of published files. Our own files have a row for each class.
    by_coco_id = source != "ours"
    theirs = source not in FOCAL_SOURCES if by_coco_id or no_object is None else no_object
    no_object = theirs if no_object is None else no_object
    rows = len(result[present[0]])
    contiguous = class_head.coco_classes(rows, no_object=theirs) if by_coco_id else None
    if num_classes is None:
        num_classes = contiguous
    if theirs != no_object:
        note = f"class head: with{'' if theirs else 'out'} no-object in the file, unlike the model"
    elif num_classes is None or rows == num_classes + no_object:
        return (), ()
    elif contiguous == num_classes:
        for key in present:
            result[key] = class_head.select_coco_rows(result[key], no_object=no_object)
        missing = no_object and rows == class_head.COCO_IDS[num_classes][0]
        return (), (
            f"class head: {rows} -> {num_classes + no_object} rows by COCO id"
            + "; no-object, which the file lacks, is 0" * missing,
        )
    else:
        note = f"class head: {rows} rows in the file, {num_classes + no_object} in the model"
    for key in present:
        del result[key]
    return present, (note,)


def _unrecognised(state_dict: Mapping[str, object]) -> str:
    first = ", ".join(repr(key) for key in list(state_dict)[:3])
    known = ", ".join(source.label for source in SOURCES.values())
    return f"its keys ({first}, ...) are of none of the known formats: {known}"
