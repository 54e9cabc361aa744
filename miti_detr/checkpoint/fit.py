"""Weights of any known format, made to fit one model and checked against its variant."""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import class_head
from .convert import ConversionReport, StateDict, convert_state_dict
from .deformable import check_same_system
from .errors import CheckpointError
from .sources import BACKBONE_SOURCES, MASK_KEY, PRETRAINING_KEY
from .variant import (
    AVERAGE,
    RECORD_KEY,
    STATE_KEY,
    Purpose,
    Variant,
    check_pre_norm,
    check_variant,
    weights_variant,
)

_BODY, _BOTTOM_UP = "backbone.body.", "backbone.body.bottom_up."
_QUERIES = "query_embed.weight"


def prepare_weights(
    state_dict: Mapping[str, Tensor | np.ndarray],
    own: Mapping[str, Tensor],
    variant: Variant,
    *,
    record: Variant | None = None,
    stated: str = "",
    purpose: Purpose,
) -> tuple[StateDict, ConversionReport, tuple[str, ...], str]:
    """Convert weights to the keys and shapes of a model, if they are meant for it.

    Args:
        state_dict: in a format that :func:`convert_state_dict` recognises.
        own: state dict of the model.
        variant: of the model; empty if it does not know.
        record: what the checkpoint says of the weights. None: looked up in the metadata of
            ``state_dict``.
        stated: value of ``MODEL.DETR.WEIGHTS_RESIDUAL``.
        purpose: as in :func:`~miti_detr.checkpoint.variant.check_variant`.

    Returns:
        The state dict to load (without the record; keys may be missing), the report of the
        conversion, lines for the log, and how the variants differ ("" if they do not).

    Raises:
        CheckpointError: if they do not fit.
    """
    metadata = dict(getattr(state_dict, "_metadata", {}))
    top = dict(metadata.get("", {}))
    recorded = top.pop(RECORD_KEY, None)
    heads = class_head.keys_in(own)
    no_object = variant.get("class_loss", "softmax") == "softmax"
    state, report = convert_state_dict(
        state_dict,
        num_classes=len(own[heads[0]]) - no_object if heads else None,
        pretraining=PRETRAINING_KEY in own,
        no_object=no_object,
        masks=MASK_KEY in own,
    )
    lines, different = [report.summary()], ""
    if report.source not in BACKBONE_SOURCES:
        check_same_system(state, own)
        check_pre_norm(variant, report.pre_norm)
        record = recorded if record is None else record
        weights = weights_variant(record, stated)
        lines.append((record or {}).get(AVERAGE, ""))
        if weights.assumed:
            lines.append(f"no layer residual is recorded: {weights.origin} ({STATE_KEY} states it)")
        different = check_variant(variant, weights, purpose=purpose)
    lines.append(fit_to_model(state, own))
    if report.source == "ours" and metadata:
        state = _WithMetadata(state)
        state._metadata = {**metadata, "": top}
    return state, report, tuple(line for line in lines if line), different


class _WithMetadata(dict[str, Tensor]):
    """A state dict with the versions of its modules, where ``nn.Module`` looks for them."""

    _metadata: dict[str, Any]


def fit_to_model(state: StateDict, own: Mapping[str, Tensor]) -> str:
    """Fit a state dict in our keys to a model, in place.

    The ResNet goes below a feature pyramid if the model has one. Query embeddings are trimmed, or
    completed with the model's own.

    Args:
        state: to be loaded; may lack keys.
        own: state dict of the model.

    Returns:
        What was done to the queries, for the log; or an empty string.

    Raises:
        CheckpointError: names a key that the model does not have, or has in another shape.
    """
    if any(key.startswith(_BOTTOM_UP) for key in own):
        for key in [k for k in state if k.startswith(_BODY) and k not in own]:
            state[_BOTTOM_UP + key.removeprefix(_BODY)] = state.pop(key)
    for key in [k for k in state if k.endswith(".num_batches_tracked") and k not in own]:
        del state[key]
    note = _fit_queries(state, own)
    for key, tensor in state.items():
        if key not in own:
            near = difflib.get_close_matches(key, own, n=3, cutoff=0.5)
            hint = f"; the nearest ones are {', '.join(near)}" if near else ""
            raise CheckpointError(f"the model has no key {key!r} as these weights do{hint}")
        if tensor.shape != own[key].shape:
            raise CheckpointError(
                f"{key} has shape {tuple(tensor.shape)} in these weights and "
                f"{tuple(own[key].shape)} in the model: its MODEL keys (sizes, layers, backbone) "
                "are not those of the weights"
            )
    return note


def _fit_queries(state: StateDict, own: Mapping[str, Tensor]) -> str:
    theirs, ours = state.get(_QUERIES), own.get(_QUERIES)
    if theirs is None or ours is None or len(theirs) == len(ours):
        return ""
    if theirs.shape[1:] != ours.shape[1:]:
        return ""  # another width: reported with the other shapes
    kept = min(len(theirs), len(ours))
    fitted = ours.detach().clone()
    fitted[:kept] = theirs[:kept]
    state[_QUERIES] = fitted
    rest = f", the other {len(ours) - kept} re-initialised" if len(ours) > kept else ""
    return f"object queries: {kept} of {len(theirs)} copied into {len(ours)}{rest}"


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not numbers.

    Raises:
        CheckpointError: names the first such tensor.
    """
    for key, tensor in state.items():
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
            continue
        if not torch.isfinite(tensor).all():  # the sum of finite numbers may overflow
            raise CheckpointError(
                f"{key} holds values that are not finite, so the model would find nothing: use an "
                "earlier checkpoint"
            )
