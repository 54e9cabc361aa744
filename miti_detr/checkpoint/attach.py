"""What every model does when its weights are saved or loaded, by any program.

Detectron2's ``DefaultTrainer`` and ``DefaultPredictor`` make their own checkpointer, which calls
``model.state_dict()`` and ``model.load_state_dict()``, often before ``model.eval()``. So the
variant travels in the metadata of the state dict; the model converts state dicts of other
implementations on the way in; and it remembers when weights of another variant were loaded. They
may be the start of a training. Inference with them, and no training step in between, is an error.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .convert import recognise
from .errors import CheckpointError
from .fit import prepare_weights
from .frozen import load_frozen_before_training
from .sources import PRETRAINING_KEY
from .variant import (
    RECORD_KEY,
    check_variant,
    make_record,
    restore_strength,
    take_record,
    variant_of,
    weights_variant,
)

logger = logging.getLogger(__name__)

_MISMATCH = "_weights_mismatch"  # attribute of a model: why it must not be used for inference


def attach_variant(model: nn.Module) -> None:
    """Let a model record and check its variant, and load its frozen weights, if it has any.

    Args:
        model: has the attribute ``variant``, as ``MitiDetr`` does, and may have
            ``weights_residual``: what ``MODEL.DETR.WEIGHTS_RESIDUAL`` states.
    """
    model.register_state_dict_post_hook(record_variant)
    model.register_load_state_dict_pre_hook(_adapt_before_load)
    model.register_forward_pre_hook(_refuse_mismatch)
    model.register_forward_pre_hook(load_frozen_before_training)


def accept_weights(model: nn.Module) -> None:
    """Use a model with the weights that it has, although they were trained for another variant."""
    model.__dict__.pop(_MISMATCH, None)


def record_variant(
    model: nn.Module, state: Mapping[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Write the model's variant into the metadata of a state dict."""
    metadata[RECORD_KEY] = make_record(variant_of(model) or {})


def adapt_state_dict(
    model: nn.Module, state: Mapping[str, Any], record: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], str]:
    """Make a state dict fit a model.

    Weights of another implementation are converted, which is logged. A plain ``dict`` in our keys
    without a record says nothing of its variant and passes.

    Detectron2's own checkpointer takes tensors of another shape out before the model sees them, so
    the class head of an official file (92 rows) is missing here.

    Args:
        model: has the attribute ``variant``.
        state: in any format that is recognised.
        record: of its variant, or None.

    Returns:
        ``state`` itself or a converted copy, and why the model must not be used for inference with
        it; "" if it may.

    Raises:
        CheckpointError: for weights that do not fit.
    """
    source = recognise(state)
    if source is None or (source == "ours" and record is None):
        return state, ""  # for nn.Module to judge
    variant = variant_of(model) or {}
    stated = getattr(model, "weights_residual", "")
    pretrained = PRETRAINING_KEY in state and PRETRAINING_KEY not in dict(model.named_parameters())
    if source == "ours" and not pretrained:
        weights = weights_variant(record, stated)
        if line := restore_strength(model, record):
            logger.info(line)
        return state, check_variant(variant, weights, purpose="unknown")
    mismatch = ""
    first = ("class_embed.weight", "class_embed.0.weight")
    if source in ("detr", "deformable_detr") and not any(key in state for key in first):
        state = {key: value for key, value in state.items() if "class_embed." not in key}
        mismatch = (
            "the class head of these weights has another shape than the model's and was left out "
            "on the way here: load them with MitiDetrCheckpointer, or run `miti-detr convert` first"
        )
    result, _report, lines, other = prepare_weights(
        dict(state), model.state_dict(), variant, record=record, stated=stated, purpose="unknown"
    )
    for line in lines:
        logger.info(line)
    return result, mismatch or other


def _adapt_before_load(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    *unused: Any,
) -> None:
    """Replace the model's part of a state dict, in place, by what fits."""
    record = take_record(state_dict, prefix) or local_metadata.get(RECORD_KEY)
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    adapted, mismatch = adapt_state_dict(model, own, record)
    accept_weights(model)
    if mismatch:
        logger.warning("%s. Train from them, or do not use this model", mismatch)
        setattr(model, _MISMATCH, mismatch)
    if adapted is not own:
        for key in own:
            del state_dict[prefix + key]
        state_dict.update({prefix + key: value for key, value in adapted.items()})


def _refuse_mismatch(model: nn.Module, inputs: Any) -> None:
    """Raise before the first inference with weights of another variant; training clears it."""
    if model.training:
        accept_weights(model)
    elif mismatch := getattr(model, _MISMATCH, ""):
        raise CheckpointError(mismatch)
