"""Compilation of parts of a model by ``torch.compile``; each is logged with its time.

What it computes: the same numbers by kernels that are generated for the shapes of the first batch,
and once more, for any size of a dimension, when that dimension changes.

Where: on any device. Forward and backward pass are compiled, in training and in evaluation.

How exact: rounding; dropout draws other random numbers.
"""

import itertools
import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)


def compile_parts(
    model: nn.Module, names: Iterable[str], *, dynamic: bool | None = None
) -> list[str]:
    """Let parts of a model run by ``torch.compile``; state-dict keys stay as they are.

    Args:
        model: changed in place.
        names: of its submodules. Those that it lacks, and lists of modules, are left out.
        dynamic: compile for any size at once; None: only when a size has changed.

    Returns:
        The names of the parts that are compiled.
    """
    modules = dict(model.named_modules())
    compiled = [n for n in names if n in modules and not isinstance(modules[n], nn.ModuleList)]
    for name in compiled:
        modules[name].compile(dynamic=dynamic)
    _announce_compilations()
    logger.info("compiled when first used, which can take minutes: %s", ", ".join(compiled))
    return compiled


def uncompiled() -> AbstractContextManager[None]:
    """While entered, compiled parts run in eager mode, from torch 2.6 on."""
    set_stance: Any = getattr(torch.compiler, "set_stance", nullcontext)
    return set_stance("force_eager")


def _announce_compilations() -> None:
    """Log all compilations of this process, if torch tells of them; the interface is private."""
    handler: Any = getattr(torch._dynamo.callback, "callback_handler", None)
    # torch._dynamo.reset forgets them.
    if _start not in getattr(handler, "start_callbacks", [_start]):
        handler.register_start_callback(_start)
        handler.register_end_callback(_end)


_starts: list[float] = []
_numbers = itertools.count(1)


def _start(_: Any) -> None:
    _starts.append(time.perf_counter())


def _end(_: Any) -> None:
    if _starts:
        seconds = time.perf_counter() - _starts.pop()
        logger.info("torch.compile: compilation %d took %.1f s", next(_numbers), seconds)
