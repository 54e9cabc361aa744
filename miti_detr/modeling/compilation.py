"""``torch.compile`` for the parts of the model that are worth it."""

import os
import shutil
import sys

import torch


def require_compiler(device: str) -> None:
    """Check that ``torch.compile`` can work, which itself finds out in the first step.

    Args:
        device: as ``MODEL.DEVICE`` names it. On a CPU, generated C++ is compiled.

    Raises:
        ValueError: there is no C++ compiler.
    """
    if torch.device(device).type != "cpu":
        return
    # Where torch looks by default (torch._inductor.config.cpp.cxx).
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"MODEL.COMPILE is True, which needs a C++ compiler on a CPU, and there is no "
            f"{compiler}: install it, name another one by the environment variable CXX, or set "
            "MODEL.COMPILE False"
        )
