"""Weights of a detector that stays as it is while a mask head is trained on it."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn

from miti_detr.pixels import Pixels, expected_pixels, warn_if_pixels_differ

from .convert import recognise
from .errors import CheckpointError
from .files import read_checkpoint
from .fit import check_finite, prepare_weights
from .sources import MASK_ONLY
from .variant import RECORD_KEY, recorded_variant, restore_strength, variant_of

logger = logging.getLogger(__name__)

_LOADED = "_frozen_weights_loaded"  # attribute of a model


def load_frozen_before_training(model: nn.Module, inputs: Any) -> None:
    """Load ``MODEL.DETR.FROZEN_WEIGHTS`` before the first training step; a forward pre-hook.

    At that time, every trainer has loaded ``MODEL.WEIGHTS`` or the run that it resumes, and nothing
    overrides the frozen weights any more. A model that is only evaluated keeps the weights that it
    has: those of a trained mask head include its detector.

    Args:
        model: may have ``frozen_weights``, the path of a file.
        inputs: not used.
    """
    path = getattr(model, "frozen_weights", "")
    if path and model.training and not model.__dict__.get(_LOADED):
        load_frozen(model, path)
        setattr(model, _LOADED, True)


def load_frozen(model: nn.Module, path: str) -> None:
    """Load the weights of a whole detector into a model with masks, whose mask head stays.

    Args:
        model: has ``bbox_attention`` and ``mask_head``, beside the parts of a detector.
        path: in any format that :func:`convert_state_dict` recognises; it may have a mask head,
            which is not used.

    Raises:
        CheckpointError: names the file, what is wrong with it, and what to do.
    """
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(MASK_ONLY)}
    try:
        checkpoint = read_checkpoint(PathManager.get_local_path(path))
        weights = checkpoint["model"]
        record = checkpoint.get(RECORD_KEY) or recorded_variant(weights)
        state, report, lines, _ = prepare_weights(
            weights,
            own,
            variant_of(model) or {},
            record=record,
            stated=getattr(model, "weights_residual", ""),
            purpose="evaluate",
        )
        check_finite(state)
        _check_complete(state, own, report.notes)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"MODEL.DETR.FROZEN_WEIGHTS {path}: {error}") from error
    pixels = getattr(model, "pixels", None)
    if pixels is not None:
        used = Pixels(pixels["pixel_mean"], pixels["pixel_std"], pixels["input_format"])
        warn_if_pixels_differ(path, expected_pixels(path, source=recognise(weights)), used)
    changed = sum(not torch.equal(own[key].cpu(), value.cpu()) for key, value in state.items())
    model.load_state_dict(state, strict=False)
    restore_strength(model, record)
    for line in lines:
        logger.info("%s: %s", path, line)
    logger.info(
        "MODEL.DETR.FROZEN_WEIGHTS %s: the detector is frozen; %d of its %d tensors were replaced, "
        "whatever MODEL.WEIGHTS says of them",
        path,
        changed,
        len(own),
    )


def _check_complete(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], notes: tuple[str, ...]
) -> None:
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    if missing:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise CheckpointError(
            f"a frozen detector must be complete, and {len(missing)} of its tensors are missing, "
            f"such as {missing[0]}{why}: name the weights of a detector trained for these classes, "
            "or load the file as MODEL.WEIGHTS instead"
        )
