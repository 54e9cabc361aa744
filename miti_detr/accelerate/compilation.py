"""Compilation of parts of a model by ``torch.compile``, which is announced.

What it computes: the same numbers by kernels that are generated for the shapes of the first batch,
and once more, for any size of a dimension, when that dimension changes.

Where: on any device. Forward and backward pass are compiled, in training and in evaluation.

How exact: rounding; dropout draws other random numbers.
"""

import functools
import itertools
import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def compile_parts(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Let parts of a model run by ``torch.compile``; state-dict keys stay as they are.

    Each compilation, which happens in the step that needs it, is logged with its time.

    Args:
        model: changed in place.
        names: of its submodules. Those that it lacks, and lists of modules, are left out.

    Returns:
        The names of the parts that are compiled.
    """
    modules = dict(model.named_modules())
    compiled = [n for n in names if n in modules and not isinstance(modules[n], nn.ModuleList)]
    for name in compiled:
        modules[name].compile()
    _announce_compilations()
    logger.info("compiled when first used, which can take minutes: %s", ", ".join(compiled))
    return compiled


@functools.cache
def _announce_compilations() -> None:
    """Log all compilations of this process, if torch tells of them; the interface is private."""
    starts: list[float] = []
    numbers = itertools.count(1)

    def start(_: Any) -> None:
        starts.append(time.perf_counter())

    def end(_: Any) -> None:
        if starts:
            seconds = time.perf_counter() - starts.pop()
            logger.info("torch.compile: compilation %d took %.1f s", next(numbers), seconds)

    handler: Any = getattr(torch._dynamo.callback, "callback_handler", None)
    if hasattr(handler, "register_start_callback"):
        handler.register_start_callback(start)
        handler.register_end_callback(end)
