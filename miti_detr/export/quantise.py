"""INT8 by ONNX Runtime's static quantisation, calibrated on the user's images."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from miti_detr.predict.backends import SessionBackend, pack
from miti_detr.predict.inputs import Source
from miti_detr.predict.sessions import open_session

from .writers import INPUTS, import_extra, quiet

# Convolutions hold most of the work. Products of attention have inputs without outliers only by
# chance: they stay in float32.
OPERATORS = ("Conv", "Gemm", "MatMul")


def quantise(source: Path, target: Path, images: Sequence[Path]) -> None:
    """Write an INT8 version of an ONNX file (quantise and dequantise nodes, weights by channel).

    Args:
        source: float32 model with its record.
        target: file to write, without record.
        images: files on which the ranges of activations are measured.

    Raises:
        ImageError: an image cannot be read.
        ImportError: onnxruntime or onnx are not installed.
        ValueError: there are no images.
    """
    if not images:
        raise ValueError("INT8 needs images for its calibration. Name some with --calibration.")
    import_extra("onnx")
    import_extra("onnxruntime")
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    backend = SessionBackend(open_session(source, "cpu"))
    with tempfile.TemporaryDirectory() as folder, quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(target),
            _Calibration(backend, images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATORS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


class _Calibration:
    """Feeds images one by one, as ``CalibrationDataReader`` does."""

    def __init__(self, backend: SessionBackend, images: Iterable[Path]) -> None:
        self._batches = self._iterate(backend, images)

    def _iterate(
        self, backend: SessionBackend, images: Iterable[Path]
    ) -> Iterator[dict[str, np.ndarray]]:
        record = backend.record
        for image in images:
            item = backend.prepare(
                Source(image, None, record.orientation).read(record.input_format)
            )
            batch = pack([item], record.static_shape, record.image_type)
            yield dict(zip(INPUTS, batch, strict=True))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None."""
        return next(self._batches, None)
