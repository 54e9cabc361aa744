"""Which function a set of weights is for.

The layer residual has no parameters: the weights of DETR and of every Miti-DETR fit each other and
compute different things. So the variant is recorded beside the weights and compared on loading.

A variant is the dict ``MitiDetr.variant``: all that determines the function of a model besides its
weights and their shapes. A record is a variant with ``version``, ``config``, ``class_names`` where
they are known, ``residual_strength`` in the middle of a ramp (``RESIDUAL_RAMP_ITERS``), the text
``weights_average`` for averages (``SOLVER.EMA``), and ``threshold`` if a report has stored one.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from miti_detr.modeling.transformer import LAYER_RESIDUALS

from .errors import CheckpointError

RECORD_KEY = "miti_detr"  # of a checkpoint, and of the metadata of a state dict
# The same in a file of tensors: JSON as uint8, which a loader cannot leave out
RECORD_TENSOR = "miti_detr.record"
STATE_KEY = "MODEL.DETR.WEIGHTS_RESIDUAL"
STRENGTH = "residual_strength"  # of a record, and the attribute of a model
AVERAGE = "weights_average"  # the same: over which training steps weights are an average
THRESHOLD = "threshold"  # of a record: the recommended lowest score of a detection

Variant = Mapping[str, Any]
Purpose = Literal["evaluate", "warm_start", "resume", "unknown"]
# Entries of a variant that change the function without changing keys or shapes of the weights.
CONFIG_KEYS = {
    "layer_residual": "MODEL.DETR.LAYER_RESIDUAL",
    "layer_residual_in": "MODEL.DETR.LAYER_RESIDUAL_IN",
    "padding_mask": "MODEL.DETR.PADDING_MASK",
    "nheads": "MODEL.DETR.NHEADS",
    "position_embedding": "MODEL.DETR.POSITION_EMBEDDING",
    "feature": "MODEL.DETR.IN_FEATURES",
    "features": "MODEL.DETR.IN_FEATURES",
    "class_loss": "MODEL.DETR.CLASS_LOSS",
    "stride": "MODEL.RESNETS.RES5_DILATION (the stride of the feature)",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "input_format": "INPUT.FORMAT",
    "mask_features": "MODEL.DETR.IN_FEATURES (the features for masks)",
    "stuff_classes": "MODEL.DETR.STUFF_CLASSES",
    "class_names": "the class names of the data",
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
    strength, average = getattr(model, STRENGTH, 1.0), getattr(model, AVERAGE, "")
    extra = {STRENGTH: strength} if strength != 1.0 else {}
    return {**variant, **extra, **({AVERAGE: average} if average else {})}


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
        cfg: kept as text, so that the model can be built from the checkpoint without a config file.
    """
    from miti_detr import __version__  # the package imports this module while it is set up

    config = "" if cfg is None else cfg.dump()
    return {"version": __version__, **variant, "config": config}


def take_record(state: dict[str, Any], prefix: str = "") -> Variant | None:
    """Take :data:`RECORD_TENSOR` out of a state dict whose keys have this prefix.

    Raises:
        CheckpointError: it is damaged.
    """
    tensor = state.pop(prefix + RECORD_TENSOR, None)
    if tensor is None:
        return None
    try:
        record: Variant = json.loads(bytes(tensor.tolist()))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{RECORD_TENSOR} in it is damaged: {error}") from error
    check_record(record)
    return record


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the classes of the first data set of a config; empty if they are not known.

    Detectron2 learns the names of most data sets only when they are first loaded.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = MetadataCatalog.get(name).get("thing_classes") if name in DatasetCatalog else None
        if names:
            return list(names)
    return []


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
        CheckpointError: if ``stated`` is no layer residual, or the record is damaged.
    """
    if stated and stated not in LAYER_RESIDUALS:
        known = ", ".join(LAYER_RESIDUALS)
        raise CheckpointError(f"{STATE_KEY} is {stated!r}; use '' or one of {known}")
    values = {}
    if record is not None:
        check_record(record)
        values = {key: record[key] for key in CONFIG_KEYS if key in record}
    if stated:
        return WeightsVariant({**values, "layer_residual": stated}, f"stated by {STATE_KEY}")
    if "layer_residual" in values:
        return WeightsVariant(values, "recorded in the file")
    return WeightsVariant({"layer_residual": "none"}, "taken as DETR", assumed=True)


def check_record(record: Any) -> None:
    """Check that a record is what :func:`make_record` makes.

    Raises:
        CheckpointError: names the entry and its value.
    """
    if not isinstance(record, Mapping):
        raise CheckpointError(
            f"the record {RECORD_KEY!r} is a {type(record).__name__} instead of a mapping: the "
            "file is damaged or comes from another program"
        )
    residual = record.get("layer_residual", "none")
    if residual not in LAYER_RESIDUALS:
        raise CheckpointError(
            f"the record says layer_residual {residual!r}; possible: {', '.join(LAYER_RESIDUALS)}"
        )
    for key in (STRENGTH, THRESHOLD):
        if type(value := record.get(key, 1.0)) not in (int, float) or not 0 <= value <= 1:
            raise CheckpointError(f"the record says {key} {value!r}; possible: 0 to 1")
    for key in ("config", AVERAGE):
        if not isinstance(record.get(key, ""), str):
            raise CheckpointError(f"the record's {key} is no text")


def check_variant(model: Variant, weights: WeightsVariant, *, purpose: Purpose) -> str:
    """Compare a model with weights.

    Args:
        model: variant of the model; empty if it is not known.
        weights: variant of the weights.
        purpose: ``evaluate`` and ``resume`` refuse a difference that changes the function;
            ``warm_start`` and ``unknown`` describe it.

    Returns:
        How they differ; "" if they do not.

    Raises:
        CheckpointError: names both values and the override.
    """
    different = _differences(model, weights.values)
    if not different:
        return ""
    pairs = "; ".join(
        f"{CONFIG_KEYS[key]} is {_text(model[key])}, the weights have {_text(weights.values[key])}"
        for key in different
    )
    wanted = " ".join(f"{CONFIG_KEYS[key]} {_text(weights.values[key])}" for key in different)
    message = (
        f"these are {describe(weights.values)} weights ({weights.origin}), the model is "
        f"{describe(model)}, which computes something else with them: {pairs}"
    )
    if purpose == "resume":
        raise CheckpointError(
            f"{message}. A run is resumed as it was begun: set {wanted}, or choose another "
            "OUTPUT_DIR"
        )
    if purpose == "evaluate":
        raise CheckpointError(f"{message}. Set {wanted}{_or_state(model, different)}")
    return f"{message}. For inference set {wanted}{_or_state(model, different)}"


def _or_state(model: Variant, different: list[str]) -> str:
    if "layer_residual" not in different:
        return ""
    return f", or, if they were trained as this model, state {STATE_KEY} {model['layer_residual']}"


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
    different = [key for key in weights if key in model and not _equal(model[key], weights[key])]
    if model.get("layer_residual") == weights.get("layer_residual") == "none":
        different = [key for key in different if key != "layer_residual_in"]
    return different


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(
            _equal(a, b) for a, b in zip(first, second, strict=True)
        )
    if isinstance(first, float) or isinstance(second, float):
        return abs(first - second) <= 1e-4 * max(1.0, abs(first))
    return bool(first == second)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        inside = ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value)
        return f"[{inside}]"
    return str(value)
