"""The same numbers, computed faster: techniques that change a plain model from outside.

A technique is one file. Its docstring says what it computes, where it applies and how exact it is;
``docs/speed.md`` has what each gains.
"""

import logging
import sys
from dataclasses import dataclass

from torch import nn

from . import (
    attention,
    channels_last,
    deformable_attention,
    dropout,
    frozen_batch_norm,
    linear,
    prepared_weights,
    residual_blocks,
)
from .activation_checkpoint import checkpoint_activations
from .compilation import compile_parts, uncompiled
from .cuda_graphs import use_cuda_graphs

__all__ = [
    "TECHNIQUES",
    "AccelerationReport",
    "accelerate",
    "checkpoint_activations",
    "compile_parts",
    "uncompiled",
    "use_cuda_graphs",
]

logger = logging.getLogger(__name__)


def _apply_to_timm(model: nn.Module) -> int:
    if "timm.layers" not in sys.modules:  # then the model has no layers of timm
        return 0
    from . import timm_batch_norm

    return timm_batch_norm.apply(model)


# In the order in which they are applied: blocks look for folded convolutions.
TECHNIQUES = {
    "frozen batch norms folded into convolutions": frozen_batch_norm.apply,
    "frozen batch norms of timm": _apply_to_timm,
    "residual blocks fused": residual_blocks.apply,
    "convolutions in channels_last layout": channels_last.apply,
    "attention modules": attention.apply,
    "deformable attention modules": deformable_attention.apply,
    "linear layers": linear.apply,
    "dropout modules": dropout.apply,
    "parts with weights prepared together": prepared_weights.apply,
}


@dataclass(frozen=True)
class AccelerationReport:
    """What :func:`accelerate` replaced.

    Attributes:
        counts: technique -> number of modules.
    """

    counts: dict[str, int]

    def __str__(self) -> str:
        """One line."""
        parts = [f"{count} {name}" for name, count in self.counts.items() if count]
        return "accelerated: " + (", ".join(parts) or "nothing to replace")


def accelerate(model: nn.Module, *, without: tuple[str, ...] = ()) -> nn.Module:
    """Replace what can be computed faster, in place; the results are equal up to rounding.

    Parameters, state-dict keys, hooks, modes and the identity of modules stay as they are. Copies
    and pickles of the model are as fast as the model. ``torch.compile``, tracing and export see
    public operators only.

    Args:
        model: any model of ``torch.nn`` layers, Detectron2 blocks and layers of this package. A
            second call replaces only what is new.
        without: names of techniques, keys of :data:`TECHNIQUES`, that are left out.

    Returns:
        The model. ``model.acceleration`` is the :class:`AccelerationReport`, which is logged.
    """
    counts = {name: apply(model) for name, apply in TECHNIQUES.items() if name not in without}
    report = AccelerationReport(counts)
    model.acceleration = report  # type: ignore[assignment]
    logger.info("%s", report)
    return model
