"""The same care for whoever loads and saves without our checkpointer.

Detectron2's ``DefaultTrainer`` and ``DefaultPredictor`` make their own checkpointer, which calls
``model.state_dict()`` and ``model.load_state_dict()``. So the variant travels in the metadata of
the state dict, and the model converts state dicts of other implementations on the way in.
"""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .class_head import KEYS
from .convert import recognise
from .errors import CheckpointError
from .fit import prepare_weights
from .tables import PRETRAINING_KEY
from .variant import (
    RECORD_KEY,
    check_variant,
    make_record,
    recorded_variant,
    restore_strength,
    variant_of,
    weights_variant,
)

logger = logging.getLogger(__name__)


def record_variant(
    model: nn.Module, state: Mapping[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """Write the model's variant into a state dict; a hook for ``register_state_dict_post_hook``."""
    metadata[RECORD_KEY] = make_record(variant_of(model) or {})


def adapt_state_dict(
    model: nn.Module, state: Mapping[str, Any], *, stated: str = "", allow_other: bool = False
) -> Mapping[str, Any]:
    """Make a state dict fit the model, or say why it must not.

    Weights of another implementation are converted, and said what they were. Weights whose variant
    is recorded, or that come from elsewhere, must be of the model's variant. A plain ``dict`` in
    our keys says nothing of its variant and passes.

    Detectron2's own checkpointer takes tensors of another shape out before the model sees them, so
    the class head of an official file (92 rows) is missing here: refused for evaluation, a warning
    for training, where it starts anew.

    Args:
        model: has an attribute ``variant``, as ``MitiDetr`` does.
        state: what ``load_state_dict`` was given.
        stated: value of ``MODEL.DETR.WEIGHTS_RESIDUAL``.
        allow_other: another variant is logged as a warm start instead of refused.

    Returns:
        ``state`` itself, or a converted copy.

    Raises:
        CheckpointError: for weights of another variant, that do not fit, or without a class head.
    """
    source = recognise(state)
    record = recorded_variant(state)
    if source is None or (source == "ours" and record is None):
        return state  # for nn.Module to judge
    variant = variant_of(model) or {}
    pretrained = PRETRAINING_KEY in state and PRETRAINING_KEY not in dict(model.named_parameters())
    if source == "ours" and not pretrained:
        said = check_variant(variant, weights_variant(record, stated), for_training=allow_other)
        for line in (said, restore_strength(model, record)):
            if line:
                logger.info(line)
        return state
    if source == "detr" and not any(key in state for key in KEYS):
        left_out = (
            "the class head of these weights has another shape than the model's and was left out "
            "on the way here: load them with MitiDetrCheckpointer, or run `miti-detr convert` first"
        )
        if not allow_other:
            raise CheckpointError(left_out)
        logger.warning(left_out)
    result, _report, lines = prepare_weights(
        dict(state), model.state_dict(), variant, stated=stated, for_training=allow_other
    )
    for line in lines:
        logger.info(line)
    return result
