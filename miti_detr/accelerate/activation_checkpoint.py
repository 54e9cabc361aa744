"""Activation checkpointing: modules keep only their input and run again in the backward pass.

What it computes: the same numbers, with less memory and more time in training.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .prepared_weights import nothing_prepared


class _Checkpointed:
    """Changes how a module runs in training, when put before its class."""

    training: bool

    def forward(self, *args: Any) -> Any:
        """Run the module; random numbers and precision are the same in both runs."""
        run = super().forward  # type: ignore[misc]
        if self.training and torch.is_grad_enabled():
            with nothing_prepared():
                return checkpoint(run, *args, use_reentrant=False)
        return run(*args)


def checkpoint_activations(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], parts: Sequence[str] = ("",)
) -> tuple[int, int]:
    """Let modules of some classes trade time for memory in training.

    State-dict keys stay as they are, and outside of training nothing changes. Modules with a batch
    norm that is not frozen are not changed: it would count each batch twice.

    Args:
        model: changed in place.
        kinds: classes of the modules.
        parts: the model's parts to which the modules belong, as :func:`parts_with` names them; by
            default it is the whole model.

    Returns:
        How many modules were changed, and how many were not.
    """
    found = [
        module
        for name, module in _named(model, kinds)
        if any(not part or f"{name}.".startswith(f"{part}.") for part in parts)
    ]
    chosen = [module for module in found if not _counts_batches(module)]
    for module in chosen:
        kind = type(module)
        module.__class__ = type(kind.__name__, (_Checkpointed, kind), {})
    return len(chosen), len(found) - len(chosen)


def parts_with(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Name the parts of a model that are or contain modules of some classes.

    Returns:
        Names such as ``backbone``, ``backbone.res2`` and ``transformer.encoder``, in order: those
        of submodules, without ``body`` and ``bottom_up``, which only wrap a backbone.
    """
    parts: dict[str, None] = {}
    for name, _ in _named(model, kinds):
        steps = name.split(".")
        parts |= dict.fromkeys(".".join(steps[:end]) for end in range(1, len(steps) + 1))
    return list(parts)


def _named(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    return [
        (re.sub(r"\.(body|bottom_up)(?=\.)", "", name), module)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]


def _counts_batches(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())
