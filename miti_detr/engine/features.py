"""Computing the features that a frozen backbone has for the training images."""

import hashlib
import logging
import time
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from miti_detr.data.kept_features import FeatureStore, digest
from miti_detr.modeling import MitiDetr

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 10.0


def check_frozen(model: nn.Module) -> None:
    """Check that the model takes features, and that its backbone does not change in training.

    Raises:
        ValueError: one of the two does not hold.
    """
    if not isinstance(model, MitiDetr):
        raise ValueError(
            f"MODEL.BACKBONE.CACHE_FEATURES needs a MitiDetr; this is a {type(model).__name__}. "
            "Set MODEL.BACKBONE.CACHE_FEATURES 0"
        )
    if any(parameter.requires_grad for parameter in model.get_submodule("backbone").parameters()):
        raise ValueError(
            "MODEL.BACKBONE.CACHE_FEATURES needs a backbone that is not trained. Set "
            "SOLVER.BACKBONE_MULTIPLIER 0, or MODEL.BACKBONE.CACHE_FEATURES 0"
        )


@torch.no_grad()
def keep_features(store: FeatureStore, model: Any, records: list[dict[str, Any]]) -> None:
    """Compute the features that are missing in a store; each process takes its share.

    A computation that was stopped continues when it is started again.

    Args:
        store: of a run; is opened for the model.
        model: a ``MitiDetr`` with its weights.
        records: dataset dicts of the training images.
    """
    store.open(_key(model))
    variants = [(record, n) for record in records for n in range(store.num_variants)]
    missing = [each for each in variants if not store.has(*each)]
    mine = missing[comm.get_rank() :: comm.get_world_size()]
    backbone, mode = model.backbone, model.backbone.training
    backbone.eval()
    start = last = time.perf_counter()
    for done, (record, number) in enumerate(mine):
        now = time.perf_counter()
        if now - last > _REPORT_SECONDS:
            last, left = now, (now - start) / done * (len(mine) - done)
            logger.info("features: %d of %d images, %.0f s left", done, len(mine), left)
        mapped = store.variant(record, number)
        features = backbone(model.preprocess_image([mapped]))
        store.write(record, number, mapped, {k: x.tensor[0] for k, x in features.items()})
    backbone.train(mode)
    comm.synchronize()
    logger.info(
        "features of %d variants of each of %d images: %d were computed in %.0f s, %d were there",
        *(store.num_variants, len(records), len(missing)),
        *(time.perf_counter() - start, len(variants) - len(missing)),
    )


def _key(model: Any) -> str:
    """Digest of the backbone with its weights, and of what is done to the pixels."""
    weights = hashlib.sha256()
    for name, tensor in model.backbone.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    settings = [repr(model.backbone), model.backbone.padding_constraints(), model.pixels]
    return digest([weights.hexdigest(), *settings])
