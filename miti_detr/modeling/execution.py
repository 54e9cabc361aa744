"""How a model is run: faster, with less memory, compiled, in lower precision."""

import dataclasses
import logging
import os
import shutil
import sys

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import CNNBlockBase
from detectron2.modeling.backbone.swin import SwinTransformerBlock
from detectron2.modeling.backbone.vit import Block
from torch import nn

from miti_detr.accelerate import accelerate, checkpoint_activations

from .transformer import DecoderLayer, EncoderLayer

logger = logging.getLogger(__name__)

# Layers of the transformer, blocks of ResNets (below a feature pyramid, too), of ViT and of Swin.
_CHECKPOINTED = (EncoderLayer, DecoderLayer, CNNBlockBase, Block, SwinTransformerBlock)


@dataclasses.dataclass(frozen=True)
class Execution:
    """What is done to a model after its construction. The default is the plain model.

    Attributes:
        accelerated: call :func:`miti_detr.accelerate.accelerate`.
        activation_checkpoint: compute the inside of transformer layers and backbone blocks twice
            instead of keeping it for the backward pass.
        compiled: run backbone and transformer by ``torch.compile``; state-dict keys stay.
        inference_dtype: precision of autocast in evaluation mode; None: as the caller has it.
    """

    accelerated: bool = False
    activation_checkpoint: bool = False
    compiled: bool = False
    inference_dtype: torch.dtype | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Execution":
        """Read the config.

        Raises:
            ValueError: a precision is unknown or the device does not have it; there is no compiler.
        """
        if cfg.MODEL.COMPILE:
            require_compiler(cfg.MODEL.DEVICE)
        return cls(
            accelerated=cfg.MODEL.ACCELERATE,
            activation_checkpoint=cfg.MODEL.DETR.ACTIVATION_CHECKPOINT,
            compiled=cfg.MODEL.COMPILE,
            inference_dtype=inference_dtype(cfg),
        )

    def apply(self, model: nn.Module) -> None:
        """Change a model with the parts ``backbone`` and ``transformer`` in place."""
        if self.accelerated:
            accelerate(model)
        if self.activation_checkpoint:
            _, left_out = checkpoint_activations(model, _CHECKPOINTED)
            if left_out:
                logger.warning(
                    "MODEL.DETR.ACTIVATION_CHECKPOINT leaves out %d blocks with batch norms that "
                    "are not frozen; set MODEL.RESNETS.NORM FrozenBN to save their memory as well",
                    left_out,
                )
        if self.compiled:
            model.get_submodule("backbone.body").compile()
            model.get_submodule("transformer").compile()


PLAIN = Execution()


def inference_dtype(cfg: CfgNode) -> torch.dtype | None:
    """Precision of evaluation and prediction; None: that of the weights.

    Raises:
        ValueError: for a precision that the device does not have.
    """
    precision = cfg.SOLVER.AMP.PRECISION
    if not cfg.TEST.AMP.ENABLED:
        return None
    if precision == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise ValueError(
            "SOLVER.AMP.PRECISION is 'float16', which needs a GPU; on a CPU set it to bfloat16"
        )
    return getattr(torch, precision)


def require_compiler(device: str) -> None:
    """Check that ``torch.compile`` can work, which torch finds out only in the first step.

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
            f"MODEL.COMPILE is True, which needs a C++ compiler on a CPU, but {compiler} was not "
            "found. Install it, name another one by the environment variable CXX, or set "
            "MODEL.COMPILE False"
        )
