"""What determines the function of a model besides its weights and their shapes."""

from typing import Any

from torch import nn

from .transformer import LayerResidual


def describe_parts(model: Any) -> dict[str, Any]:
    """Describe the parts of a ``MitiDetr``, in plain values.

    What a transformer of another class does not know is left out.
    """
    transformer, feature = model.transformer, model.backbone.in_features[-1]
    names = {name: name for name in ("layer_residual", "layer_residual_in", "pre_norm")}
    names["nheads"] = "nhead"
    return {
        **{key: getattr(transformer, x) for key, x in names.items() if hasattr(transformer, x)},
        "padding_mask": model.backbone.padding_mask,
        "position_embedding": getattr(model.position_encoding, "name", "unknown"),
        "feature": feature,
        "stride": model.backbone.strides[feature],
        "num_classes": model.num_classes,
        "class_loss": model.criterion.class_loss.name,
    }


def residuals_of(transformer: nn.Module) -> list[LayerResidual]:
    """List the layer residuals of a transformer, except those that are switched off."""
    modules = transformer.modules()
    return [m for m in modules if isinstance(m, LayerResidual) and m.placement != "none"]
