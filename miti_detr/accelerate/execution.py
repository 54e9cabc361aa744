"""How a model is run: faster, with less memory, compiled, in lower precision."""

import dataclasses
import logging
import operator
import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import CNNBlockBase
from detectron2.modeling.backbone.swin import SwinTransformerBlock
from detectron2.modeling.backbone.vit import Block
from torch import nn

from . import accelerate
from .activation_checkpoint import checkpoint_activations, parts_with
from .compilation import compile_parts
from .cuda_graphs import use_cuda_graphs

logger = logging.getLogger(__name__)

# Of ResNets (below a feature pyramid, too), of ViT and of Swin.
BACKBONE_BLOCKS = (CNNBlockBase, Block, SwinTransformerBlock)
_COMPILED = ("backbone.body", "transformer", "class_embed", "bbox_embed")
_COMPILED_FOR_ANY_SIZE = ("criterion.class_loss", "criterion.box_loss")


@dataclasses.dataclass(frozen=True)
class Execution:
    """Changes to a model after its construction. The default is the plain model.

    Attributes:
        accelerated: call :func:`miti_detr.accelerate.accelerate`.
        activation_checkpoint: parts of the model in which the inside of transformer layers and
            backbone blocks is computed twice instead of being kept for the backward pass.
        compiled: run backbone, transformer, heads and loss terms by ``torch.compile``.
        cuda_graphs: run backbone and transformer from CUDA graphs, one for each shape of a batch.
        inference_dtype: precision of autocast in evaluation mode; None: as the caller has it.
        tf32: use TensorFloat-32 for float32 on GPUs, in the whole process; None: as torch has it.
    """

    accelerated: bool = False
    activation_checkpoint: tuple[str, ...] = ()
    compiled: bool = False
    cuda_graphs: bool = False
    inference_dtype: torch.dtype | None = None
    tf32: bool | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Execution":
        """Read the config.

        Raises:
            ValueError: the device has no such precision, compiler or graphs, or keys exclude them.
        """
        if cfg.MODEL.COMPILE:
            require_compiler(cfg.MODEL.DEVICE)
        if cfg.MODEL.CUDA_GRAPHS:
            check_cuda_graphs(cfg)
        detr = cfg.MODEL.DETR
        parts = tuple(detr.ACTIVATION_CHECKPOINT_IN) if detr.ACTIVATION_CHECKPOINT else ()
        return cls(
            accelerated=cfg.MODEL.ACCELERATE,
            activation_checkpoint=parts,
            compiled=cfg.MODEL.COMPILE,
            cuda_graphs=cfg.MODEL.CUDA_GRAPHS,
            inference_dtype=inference_dtype(cfg),
            tf32=_TF32[cfg.MODEL.TF32],
        )

    def apply(self, model: nn.Module, layer: type[nn.Module]) -> None:
        """Change a model with the parts ``backbone`` and ``transformer`` in place.

        Args:
            model: a detector.
            layer: class of the layers of its transformer.

        Raises:
            ValueError: the model has no such part to compute twice.
        """
        if self.tf32 is not None:
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32
        if self.accelerated:
            accelerate(model)
        if self.activation_checkpoint:
            self._checkpoint_activations(model, (layer, *BACKBONE_BLOCKS))
        if self.compiled:
            compile_parts(model, _COMPILED)
            compile_parts(model, _COMPILED_FOR_ANY_SIZE, dynamic=True)
        if self.cuda_graphs:
            use_cuda_graphs(model.get_submodule("backbone.body"))
            use_cuda_graphs(model.get_submodule("transformer"))

    def precision(self, model: Any) -> AbstractContextManager[Any]:
        """Autocast of a detector in evaluation mode, if it is asked for."""
        if model.training or self.inference_dtype is None:
            return nullcontext()  # a disabled autocast would override the caller's
        return torch.autocast(model.device.type, self.inference_dtype)

    def _checkpoint_activations(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
        known = parts_with(model, kinds)
        for part in self.activation_checkpoint:
            if part == "backbone" and part not in known:
                logger.warning(
                    "MODEL.DETR.ACTIVATION_CHECKPOINT leaves out the backbone: only the blocks of "
                    "Detectron2's ResNet, ViT and Swin are computed twice"
                )
            elif part not in known:
                parts = [name for name in known if not name.rpartition(".")[2].isdigit()]
                raise ValueError(
                    f"MODEL.DETR.ACTIVATION_CHECKPOINT_IN has {part!r}, in which nothing can be "
                    f"computed twice. Choose from {', '.join(parts)}."
                )
        done, left_out = checkpoint_activations(model, kinds, self.activation_checkpoint)
        names = ", ".join(self.activation_checkpoint)
        logger.info("%d layers and blocks are computed twice (%s)", done, names)
        if left_out:
            logger.warning(
                "MODEL.DETR.ACTIVATION_CHECKPOINT leaves out %d blocks with batch norms that are "
                "not frozen; set MODEL.RESNETS.NORM FrozenBN to save their memory as well",
                left_out,
            )


_TF32 = {"default": None, "on": True, "off": False}
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


def check_cuda_graphs(cfg: CfgNode) -> None:
    """Check that CUDA graphs can be used.

    Raises:
        ValueError: there is no GPU, or another key excludes them.
    """
    if torch.device(cfg.MODEL.DEVICE).type != "cuda":
        raise ValueError(
            f"MODEL.CUDA_GRAPHS is True, which needs a GPU, and MODEL.DEVICE is "
            f"{cfg.MODEL.DEVICE}. Set MODEL.CUDA_GRAPHS False"
        )
    for key in ("COMPILE", "DETR.ACTIVATION_CHECKPOINT", "DETR.RESIDUAL_RAMP_ITERS"):
        if value := operator.attrgetter(key)(cfg.MODEL):
            raise ValueError(
                f"MODEL.CUDA_GRAPHS is True and MODEL.{key} is {value}, which cannot be combined. "
                "Leave one of them at its default"
            )


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
