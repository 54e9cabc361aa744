"""How a module of a model is made faster in place.

A faster class derives from the plain one and has the same parameters, so exchanging the class of a
module keeps its identity, parameters, state-dict keys, hooks and mode; copies and pickles keep the
faster class.
"""

import torch
from torch import nn


def exchange(module: nn.Module, faster: type[nn.Module]) -> None:
    """Change the class of a module to ``faster``, a subclass of it."""
    assert issubclass(faster, type(module)), f"{faster} is no {type(module)}"
    module.__class__ = faster


def is_recorded() -> bool:
    """True while tracing or compiling, when only public operators may be used."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()
