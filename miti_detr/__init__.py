"""Miti-DETR for Detectron2: DETR with one extra path from a layer's input to its output.

Importing it registers the models and data sets with Detectron2. Where torch or Detectron2 is not
installed, :func:`load_predictor` still runs exported models, and other names raise an
``ImportError``.
"""

import warnings

__version__ = "0.1.0"

from .predict import load_predictor

try:
    import detectron2  # noqa: F401
    import torch  # noqa: F401
except ImportError as error:
    _MISSING = str(error)
    __all__ = ["__version__", "load_predictor"]

    def __getattr__(name: str) -> object:
        """Say why a name of this package is missing."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"miti_detr.{name} needs torch and Detectron2, which cannot be imported: {_MISSING}. "
            "Without them, load_predictor runs exported models (.onnx)."
        )

else:
    with warnings.catch_warnings():
        # Of torch about Detectron2, whenever that is imported
        warnings.filterwarnings("ignore", "`?torch.jit.script", FutureWarning)
        from . import (
            data,  # registers the data set shapes
            modeling,  # registers the meta-architecture and the backbone builders
        )
        from .add_residual import add_layer_residual
        from .checkpoint import attach_variant
        from .config import add_miti_detr_config
        from .modeling import (
            deformable,  # registers DeformableDetr
            deformable_segmentation,  # which has masks with it
            pretrain,  # registers UpDetr
        )
        from .modeling.detr import ON_CONSTRUCTION

    ON_CONSTRUCTION.append(attach_variant)

    __all__ = [
        "__version__",
        "add_layer_residual",
        "add_miti_detr_config",
        "data",
        "deformable",
        "deformable_segmentation",
        "load_predictor",
        "modeling",
        "pretrain",
    ]
