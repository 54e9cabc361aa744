"""The way from a file to a predictor; needs neither torch nor Detectron2 for exported models."""

import logging
import os
from collections.abc import Sequence

from .backends import Backend, SessionBackend
from .predictor import DetectionPredictor
from .sessions import SESSIONS, open_session

logger = logging.getLogger(__name__)


def load_predictor(
    weights: str | os.PathLike[str],
    *,
    device: str | None = None,
    precision: str | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    classes: Sequence[str | int] | None = None,
    tile: int | None = None,
    overlap: float = 0.2,
    tta: bool = False,
    batch_size: int = 4,
    config_file: str | None = None,
    overrides: Sequence[str] = (),
) -> DetectionPredictor:
    """Load a model for prediction.

    Args:
        weights: a checkpoint, or a file that ``miti-detr export`` has written: ``.onnx`` (needs
            only onnxruntime, NumPy and Pillow), ``.xml`` (OpenVINO) or ``.pt2`` (torch).
        device: ``cpu``, ``cuda`` or ``cuda:1``, of ONNX also ``tensorrt``. By default a checkpoint
            runs where its config says, an exported model on a GPU if its runtime supports one.
        precision: of checkpoints: ``float32``, ``bfloat16`` or ``float16`` (GPU); by default what
            the config says, usually ``float32``. An exported model has that of its export.
        threshold: lowest score of a detection, in 0..1; by default the one that is recorded with
            the model, else 0.5.
        top_k: largest number of detections per image; None: all.
        classes: names or indices of the classes to detect; None: all.
        tile: side in pixels of the tiles in which larger images are also searched; None: no tiles.
        overlap: part of a tile that the next one shares, at least 0 and less than 1.
        tta: of checkpoints: merge the detections of several views of an image (``TEST.AUG``).
        batch_size: largest number of images or tiles in a forward pass.
        config_file: YAML file of a checkpoint that does not record its config.
        overrides: alternating config keys and values for a checkpoint.

    Returns:
        The predictor: ``predictor("photo.jpg")``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the runtime of an exported model is not installed.
        ValueError: the file, or one of the arguments, cannot be used; says why.
    """
    path = os.fspath(weights)
    if is_exported(path):
        backend = _exported(path, device, precision, [config_file, *overrides], tta)
    else:
        backend = _checkpoint(path, device, precision, tta, threshold, config_file, overrides)
    predictor = DetectionPredictor(
        backend,
        threshold=threshold,
        top_k=top_k,
        classes=classes,
        tile=tile,
        overlap=overlap,
        batch_size=batch_size,
    )
    logger.info("%s: %s", path, predictor)
    return predictor


def is_exported(path: str) -> bool:
    """Whether the name of a file is that of an exported model."""
    return os.path.splitext(path)[1].lower() in SESSIONS


def _exported(
    path: str, device: str | None, precision: str | None, config: Sequence[str | None], tta: bool
) -> Backend:
    if any(config) or tta:
        wrong = "Test-time augmentation is" if tta else "Config keys are"
        raise ValueError(f"{path} is an exported model. {wrong} for checkpoints.")
    backend = SessionBackend(open_session(path, device))
    if precision not in (None, backend.precision):
        raise ValueError(
            f"{path} was exported in {backend.precision}, precision is {precision!r}. Export it in "
            "that precision."
        )
    return backend


def _checkpoint(
    path: str,
    device: str | None,
    precision: str | None,
    tta: bool,
    threshold: float | None,
    config_file: str | None,
    overrides: Sequence[str],
) -> Backend:
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{path} needs torch and Detectron2, which cannot be imported ({error}). Exported "
            "models (.onnx) run without them."
        ) from error
    from .torch_backend import CheckpointBackend, checkpoint_config

    cfg = checkpoint_config(
        path,
        device=device,
        precision=precision,
        tta=tta,
        config_file=config_file,
        overrides=overrides,
    )
    return CheckpointBackend(cfg, threshold)
