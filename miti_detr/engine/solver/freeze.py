"""Parts of the model that do not change."""

import difflib
import logging

from detectron2.config import CfgNode
from torch import nn

logger = logging.getLogger(__name__)


def is_backbone(name: str) -> bool:
    """Say whether the parameter ``name`` has the learning rate of the backbone.

    The published rule is "the name contains ``backbone``". The published backbone includes learned
    position encodings, so these have its learning rate, too.
    """
    return "backbone" in name or name.startswith("position_encoding")


def freeze(cfg: CfgNode, model: nn.Module) -> None:
    """Take the gradients from the parts that ``SOLVER.FREEZE`` names, and log how much that is.

    Args:
        cfg: uses ``SOLVER.FREEZE``.
        model: changed in place.

    Raises:
        ValueError: a name is no part of the model, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for prefix in cfg.SOLVER.FREEZE:
        found = [p for name, p in parameters.items() if _is_below(name, prefix)]
        if not found:
            raise ValueError(
                f"SOLVER.FREEZE names {prefix!r}, which has no weights in the model; there are "
                f"{', '.join(_parts_like(prefix, parameters))}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
        count = sum(p.numel() for p in found)
        logger.info("SOLVER.FREEZE %s: %s weights do not change", prefix, f"{count:,}")
    left = sum(p.numel() for p in parameters.values() if p.requires_grad)
    if not left:
        raise ValueError(f"SOLVER.FREEZE {tuple(cfg.SOLVER.FREEZE)} leaves nothing to train")
    if cfg.SOLVER.FREEZE:
        whole = sum(p.numel() for p in parameters.values())
        logger.info("SOLVER.FREEZE: %s of %s weights are trained", f"{left:,}", f"{whole:,}")


def frozen_norms(cfg: CfgNode, model: nn.Module) -> list[nn.Module]:
    """Find the batch normalisations whose statistics must not change.

    Parts in ``SOLVER.FREEZE`` and a backbone with ``SOLVER.BACKBONE_MULTIPLIER`` 0 are frozen; in
    training mode, their batch normalisations would still follow the batches.

    Args:
        cfg: uses the two keys.
        model: of which parts may be frozen.
    """
    is_fixed = cfg.SOLVER.BACKBONE_MULTIPLIER <= 0
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (
            (is_fixed and is_backbone(name))
            or any(_is_below(name, prefix) for prefix in cfg.SOLVER.FREEZE)
        )
    ]


def _is_below(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")


def _parts_like(prefix: str, names: dict[str, nn.Parameter]) -> list[str]:
    """Parts of a model whose names are like a wrong one, or the largest parts."""
    parts = {
        name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)
    }
    near = difflib.get_close_matches(prefix, sorted(parts), n=3)
    return near or sorted({name.split(".")[0] for name in names})
