"""Which function a set of weights is for.

The layer residual has no parameters: the weights of DETR and of every Miti-DETR fit each other and
compute different things. So the variant is recorded beside the weights and compared on loading.

A variant is the dict that ``MitiDetr.variant`` holds: ``layer_residual``, ``layer_residual_in``,
``pre_norm``, ``padding_mask``, ``num_classes``. A record is a variant with ``version`` and
``config``; in the middle of a ramp (``MODEL.DETR.RESIDUAL_RAMP_ITERS``) also ``residual_strength``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from .errors import CheckpointError

RECORD_KEY = "miti_detr"  # of a checkpoint, and of the metadata of a state dict
LAYER_RESIDUALS = ("none", "before_norm", "after_norm")
STATE_KEY = "MODEL.DETR.WEIGHTS_RESIDUAL"
STRENGTH = "residual_strength"  # of a record, and the attribute of a model

Variant = Mapping[str, Any]
# Keys of a variant that change the function without changing the keys or shapes of the weights.
CONFIG_KEYS = {
    "layer_residual": "MODEL.DETR.LAYER_RESIDUAL",
    "layer_residual_in": "MODEL.DETR.LAYER_RESIDUAL_IN",
    "padding_mask": "MODEL.DETR.PADDING_MASK",
}


def variant_of(model: nn.Module) -> dict[str, Any] | None:
    """Read the variant of a model.

    Returns:
        A copy; empty for a model of ours that does not know its variant; None for a model that is
        not ours.
    """
    variant = getattr(model, "variant", None)
    if variant is None:
        return None
    if dataclasses.is_dataclass(variant) and not isinstance(variant, type):
        return dataclasses.asdict(variant)
    if not isinstance(variant, Mapping):
        return None
    strength = getattr(model, STRENGTH, 1.0)
    return {**variant, **({} if strength == 1.0 else {STRENGTH: strength})}


def recorded_variant(state_dict: Mapping[str, Any]) -> Variant | None:
    """Read the record that :func:`~miti_detr.checkpoint.record_variant` left in a state dict."""
    return getattr(state_dict, "_metadata", {}).get("", {}).get(RECORD_KEY)


def restore_strength(model: nn.Module, record: Variant | None) -> str:
    """Give the layer residual of a model the strength that its new weights were trained with.

    Args:
        model: changed in place, if it knows a strength.
        record: of the weights; None or without a strength: 1.

    Returns:
        What to log, or an empty string.
    """
    strength = float((record or {}).get(STRENGTH, 1.0))
    if not hasattr(model, STRENGTH):
        return ""
    setattr(model, STRENGTH, strength)
    if strength == 1.0:
        return ""
    return (
        f"from the middle of a ramp: the layer residual has strength {strength:.4g}, which the "
        "model takes over"
    )


def make_record(variant: Variant, cfg: CfgNode | None = None) -> dict[str, Any]:
    """Make what a checkpoint says about its weights; plain values, which load safely.

    Args:
        variant: of the model.
        cfg: kept as text, so that the model can be built from the checkpoint alone.
    """
    from miti_detr import __version__  # the package imports this module while it is set up

    config = "" if cfg is None else cfg.dump()
    return {"version": __version__, **variant, "config": config}


@dataclasses.dataclass(frozen=True)
class WeightsVariant:
    """What is known about the variant of weights that are to be loaded.

    Attributes:
        values: the part of a variant that is known.
        origin: who says so, for messages.
        assumed: nobody does: taken as DETR.
    """

    values: dict[str, Any]
    origin: str
    assumed: bool = False


def weights_variant(record: Variant | None, stated: str = "") -> WeightsVariant:
    """Find out the variant of weights.

    Args:
        record: from their checkpoint, if it has one.
        stated: layer residual that the user says they have; goes before the record.

    Raises:
        CheckpointError: if ``stated`` is no layer residual.
    """
    if stated:
        if stated not in LAYER_RESIDUALS:
            known = ", ".join(LAYER_RESIDUALS)
            raise CheckpointError(f"{STATE_KEY} is {stated!r}; use '' or one of {known}")
        return WeightsVariant({"layer_residual": stated}, f"stated by {STATE_KEY}")
    if record and "layer_residual" in record:
        values = {key: record[key] for key in CONFIG_KEYS if key in record}
        return WeightsVariant(values, "recorded in the file")
    return WeightsVariant({"layer_residual": "none"}, "taken as DETR", assumed=True)


def check_variant(model: Variant, weights: WeightsVariant, *, for_training: bool) -> str:
    """Compare a model with weights.

    Args:
        model: variant of the model; empty if it is not known.
        weights: variant of the weights.
        for_training: the model will be trained from here, so that it may start from another one.

    Returns:
        What to log, or an empty string.

    Raises:
        CheckpointError: if they differ and the model is not for training.
    """
    said = ""
    if weights.assumed:
        said = f"the file does not say its layer residual: {weights.origin} ({STATE_KEY} states it)"
    different = _differences(model, weights.values)
    if not different:
        return said
    if not for_training:
        wanted = " ".join(f"{CONFIG_KEYS[key]} {weights.values[key]}" for key in different)
        raise CheckpointError(
            f"these are {describe(weights.values)} weights ({weights.origin}), the model is "
            f"{describe(model)}, which computes something else with them. Either set {wanted}, or, "
            f"if they were trained as what the model is, state {STATE_KEY} "
            f"{model['layer_residual']}"
        )
    start = f"{describe(weights.values)} weights into a {describe(model)}: a warm start"
    return "; ".join(part for part in (said, start) if part)


def check_pre_norm(model: Variant, pre_norm: bool | None) -> None:
    """Refuse weights of the other norm order, whose LayerNorms mean something else.

    Args:
        model: variant of the model; empty if it is not known.
        pre_norm: of the weights; None if they hold no transformer.

    Raises:
        CheckpointError: if they differ.
    """
    if pre_norm is None or model.get("pre_norm", pre_norm) == pre_norm:
        return
    raise CheckpointError(
        f"the weights are {'pre' if pre_norm else 'post'}-norm and the model is not: set "
        f"MODEL.DETR.PRE_NORM {pre_norm}"
    )


def describe(variant: Variant) -> str:
    """Name a variant as people do, in a few words."""
    residual = variant.get("layer_residual", "none")
    words = [] if residual == "none" else [residual]
    if words and variant.get("layer_residual_in", "both") != "both":
        words.append(f"{variant['layer_residual_in']} only")
    if "padding_mask" in variant:
        words.append(f"{variant['padding_mask']} padding mask")
    if STRENGTH in variant:
        words.append(f"strength {variant[STRENGTH]:.4g}")
    name = "DETR" if residual == "none" else "Miti-DETR"
    return f"{name} ({', '.join(words)})" if words else name


def _differences(model: Variant, weights: Variant) -> list[str]:
    """Keys in which two variants differ; a stack choice says nothing without a residual."""
    different = [key for key in weights if key in model and model[key] != weights[key]]
    if model.get("layer_residual") == weights.get("layer_residual") == "none":
        different = [key for key in different if key != "layer_residual_in"]
    return different
