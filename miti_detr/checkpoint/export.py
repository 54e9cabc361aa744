"""Weight files from one format to another."""

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import Tensor

from miti_detr.files import atomic_write
from miti_detr.yaml_files import parse_config

from .class_head import COCO_IDS, keys_in
from .convert import ConversionReport, StateDict, convert_state_dict, to_d2_wrapper, to_official
from .deformable import KEY as DEFORMABLE_KEY
from .errors import CheckpointError
from .files import read_checkpoint
from .huggingface import to_hf
from .variant import (
    AVERAGE,
    LAYER_RESIDUALS,
    RECORD_KEY,
    RECORD_TENSOR,
    STATE_KEY,
    STRENGTH,
    make_record,
    recorded_variant,
)

FORMATS = ("ours", "detr", "d2-wrapper", "hf")
_GUESSED = (
    "the file does not say its number of attention heads, nor whether it is DC5: config.json has "
    '8, as is usual, and no; for DC5 weights set "dilation": true there'
)


def convert_file(
    source: str,
    target: str,
    to: str,
    *,
    num_classes: int | None = None,
    residual: str | None = None,
    trust: bool = False,
) -> list[str]:
    """Convert a file of weights.

    Args:
        source: any file or folder that :func:`read_checkpoint` reads, or an address.
        target: file to write (with ``hf``: folder); an existing one is replaced. With the suffix
            ``.safetensors`` it is one, otherwise a file of ``torch.save``.
        to: one of :data:`FORMATS`.
        num_classes: K of the result. None: by COCO id for ``detr``, contiguous for the others,
            and other data sets as they are.
        residual: layer residual of the weights, for sources that do not record it.
        trust: as in :func:`read_checkpoint`.

    Returns:
        Lines that say what was done.

    Raises:
        ValueError: for an unknown format or residual.
        CheckpointError: if the weights cannot be read or do not fit the format.
    """
    if to not in FORMATS:
        raise ValueError(f"format {to!r} is not one of {', '.join(FORMATS)}")
    if to != "hf" and os.path.isdir(target):
        raise CheckpointError(f"{target}: a folder; give the name of a file to write")
    checkpoint = read_checkpoint(PathManager.get_local_path(source), trust=trust)
    by_coco_id = to == "detr" and num_classes in {rows for rows, _ in COCO_IDS.values()}
    try:
        state, report = convert_state_dict(
            checkpoint["model"], num_classes=None if by_coco_id else num_classes, masks=True
        )
        record = _record(checkpoint, residual, report)
        lines = [report.summary(), *filter(None, [record.get(AVERAGE)])]
        if to == "ours":
            write_weights(target, state, record)
        else:
            lines += _export(target, to, state, record, num_classes)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return [*lines, f"wrote {target}"]


def _export(
    target: str, to: str, state: StateDict, record: Mapping[str, Any], num_classes: int | None
) -> list[str]:
    if not keys_in(state):
        raise CheckpointError(
            f"a whole model is needed for {to}, and these weights have no class head for it; "
            "without --num-classes the head stays as it is"
        )
    residual = record.get("layer_residual")
    needed = "focal" if DEFORMABLE_KEY in state else "softmax"
    if record.get("class_loss", needed) != needed:
        raise CheckpointError(
            f"MODEL.DETR.CLASS_LOSS is {record['class_loss']} in these weights, {to} has {needed}"
        )
    if record.get(STRENGTH, 1.0) != 1.0:
        raise CheckpointError(
            f"the layer residual has strength {record[STRENGTH]:.4g} in these weights, which {to} "
            "cannot say: train to the end of MODEL.DETR.RESIDUAL_RAMP_ITERS first"
        )
    recorded = record.get("config")
    config = CfgNode(parse_config(recorded, "the recorded config")) if recorded else None
    if config is not None and to != "d2-wrapper":
        _check_resnet(config, to)
    if to == "hf":
        if residual not in (None, "none"):
            raise CheckpointError(f"Hugging Face's models have no layer residual {residual}")
        _save_hf(target, state, config)
        return [] if config is not None else [_GUESSED]
    official = to == "detr"
    result = to_official(state, num_classes=num_classes) if official else to_d2_wrapper(state)
    write_weights(target, result)
    if residual in (None, "none"):
        return []
    return [
        f"this format cannot record that these are {residual} weights: state {STATE_KEY} "
        f"{residual} wherever they are loaded"
    ]


def _record(
    checkpoint: Mapping[str, Any], residual: str | None, report: ConversionReport
) -> dict[str, Any]:
    """What the source or the caller says of the weights; empty if nobody does."""
    record = checkpoint.get(RECORD_KEY) or recorded_variant(checkpoint["model"]) or {}
    known = record.get("layer_residual", residual)
    if residual is None:
        return dict(record)
    if residual not in LAYER_RESIDUALS:
        raise ValueError(f"residual {residual!r} is not one of {', '.join(LAYER_RESIDUALS)}")
    if known != residual:
        raise CheckpointError(f"the file records {known} as its layer residual, not {residual}")
    stated = {"layer_residual": residual, "layer_residual_in": "both", "pre_norm": report.pre_norm}
    return dict(record) or make_record(stated)


def write_weights(
    path: str, state: Mapping[str, Tensor], record: Mapping[str, Any] | None = None
) -> None:
    """Write a file of weights, whole or not at all.

    Args:
        path: of the file; the suffix ``.safetensors`` decides its format.
        state: tensors by key.
        record: what :func:`~miti_detr.checkpoint.make_record` makes; None or empty: none.
    """
    with atomic_write(path) as file:
        if path.endswith(".safetensors"):
            # Copies: safetensors takes neither shared memory nor the layout channels_last.
            copies = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
            if record:
                text = bytearray(json.dumps(record).encode())
                copies[RECORD_TENSOR] = torch.frombuffer(text, dtype=torch.uint8)
            file.write(safetensors.torch.save(copies, metadata={"format": "pt"}))
        else:
            torch.save({"model": state, **({RECORD_KEY: record} if record else {})}, file)


def _check_resnet(cfg: CfgNode, to: str) -> None:
    """Refuse ResNets with the keys and shapes of the published ones that compute something else."""
    resnets = cfg.MODEL.RESNETS
    builder = cfg.MODEL.BACKBONE.NAME
    if resnets.DEPTH >= 50 and resnets.STRIDE_IN_1X1:
        raise CheckpointError(f"{to} has no MODEL.RESNETS.STRIDE_IN_1X1, which these weights need")
    if resnets.RES5_DILATION == 2 and builder != "build_detr_resnet_backbone":
        raise CheckpointError(f"DC5 of {to} is not that of {builder}, which these weights need")


def _save_hf(folder: str, state: Mapping[str, Tensor], cfg: CfgNode | None) -> None:
    options = {} if cfg is None else _hf_options(cfg)
    tensors, config = to_hf(state, **options)
    write_weights(os.path.join(folder, "model.safetensors"), tensors)
    with atomic_write(os.path.join(folder, "config.json")) as file:
        file.write(json.dumps(config, indent=2).encode())


def _hf_options(cfg: CfgNode) -> dict[str, Any]:
    """What the weights do not tell but a recorded config does."""
    names = None
    if cfg.DATASETS.TRAIN and cfg.DATASETS.TRAIN[0] in MetadataCatalog.list():
        names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    return {
        "nhead": cfg.MODEL.DETR.NHEADS,
        "num_queries": cfg.MODEL.DETR.NUM_OBJECT_QUERIES,
        "dilation": cfg.MODEL.RESNETS.RES5_DILATION == 2,
        "class_names": names if names and len(names) == cfg.MODEL.DETR.NUM_CLASSES else None,
    }
