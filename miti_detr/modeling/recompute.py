"""Activation checkpointing: layers keep their input alone, and run again in the backward pass."""

import logging
from typing import Any

import torch
from detectron2.modeling.backbone.resnet import CNNBlockBase
from detectron2.modeling.backbone.swin import SwinTransformerBlock
from detectron2.modeling.backbone.vit import Block
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .transformer import DecoderLayer, EncoderLayer

logger = logging.getLogger(__name__)

# Layers of the transformer, blocks of ResNets (below a feature pyramid, too), of ViT and of Swin.
_KINDS = (EncoderLayer, DecoderLayer, CNNBlockBase, Block, SwinTransformerBlock)


class _Recomputed:
    """Put before the class of a module, changes how it runs in training."""

    training: bool

    def forward(self, *args: Any) -> Any:
        """Run the module; random numbers and precision are the same in both runs."""
        run = super().forward  # type: ignore[misc]
        if self.training and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)


def recompute_activations(module: nn.Module) -> int:
    """Let the layers below ``module`` trade time for memory in training: the same numbers.

    State-dict keys stay as they are, and outside of training nothing changes. Blocks with a batch
    norm that is not frozen are left alone: it would count each batch twice.

    Args:
        module: changed in place; any, the transformer's layers and the blocks of Detectron2's
            ResNet, ViT and Swin are found in it.

    Returns:
        How many layers were changed.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _KINDS)]
    chosen = [layer for layer in layers if not _counts_batches(layer)]
    for layer in chosen:
        kind = type(layer)
        layer.__class__ = type(kind.__name__, (_Recomputed, kind), {})
    if len(chosen) < len(layers):
        logger.warning(
            "MODEL.DETR.ACTIVATION_CHECKPOINT leaves out %d blocks with batch norms that are not "
            "frozen; set MODEL.RESNETS.NORM FrozenBN to save their memory as well",
            len(layers) - len(chosen),
        )
    return len(chosen)


def _counts_batches(layer: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in layer.modules())
