"""Registry of transformers."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

TRANSFORMER_REGISTRY = Registry("TRANSFORMER")
TRANSFORMER_REGISTRY.__doc__ = """
Registry of transformers, chosen by ``MODEL.DETR.TRANSFORMER_NAME``.

A registered class is called with the config; its ``forward`` takes and returns what
:meth:`ResidualTransformer.forward` does (``query_mask`` only for ``UpDetr``), and ``d_model`` tells
its width.
"""


def build_transformer(cfg: CfgNode) -> nn.Module:
    """Make the transformer that ``cfg.MODEL.DETR.TRANSFORMER_NAME`` names.

    Raises:
        ValueError: if no transformer of that name is registered.
    """
    name = cfg.MODEL.DETR.TRANSFORMER_NAME
    if name not in TRANSFORMER_REGISTRY:
        known = ", ".join(sorted(key for key, _ in TRANSFORMER_REGISTRY))
        raise ValueError(f"MODEL.DETR.TRANSFORMER_NAME is {name!r}; registered are: {known}")
    return TRANSFORMER_REGISTRY.get(name)(cfg)
