"""Writing of a recorded model: torch.export, ONNX, OpenVINO."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from miti_detr.predict.record import MASKS, OUTPUTS, RECORD_NAME, ExportRecord

from .tensor_detector import TensorDetector

OPSET = 18
INPUTS = ("images", "sizes")
_AXES = {
    "images": ("batch", None, "height", "width"),
    "sizes": ("batch", None),
    MASKS: ("batch", None, "mask_height", "mask_width"),
}
_EXAMPLE = (2, 96, 128)  # N, H, W of the batch that is recorded, if the shape is free


def record_program(
    detector: TensorDetector, *, shape: tuple[int, int, int] | None, image_type: str
) -> ExportedProgram:
    """Record a detector by ``torch.export``.

    Args:
        detector: in evaluation mode.
        shape: N, H and W of the only batch that it takes; None: any.
        image_type: ``uint8`` or ``float32``.

    Raises:
        ValueError: torch cannot record the model.
    """
    count, height, width = shape or _EXAMPLE
    images = torch.zeros(count, 3, height, width, dtype=getattr(torch, image_type))
    sizes = torch.tensor([[height - height // 4, width]] + [[height, width]] * (count - 1))
    free = Dim.DYNAMIC
    dynamic = None if shape else ({0: free, 2: free, 3: free}, {0: free})
    device = detector.model.device
    arguments = (images.to(device), sizes.to(device))
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(detector, arguments, dynamic_shapes=dynamic)
    except Exception as error:  # of many classes; the first line says what it is
        advice = "" if shape else " With --static N H W, it may be possible."
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.export cannot record this model: {reason}.{advice}") from error


def write_program(program: ExportedProgram, record: ExportRecord, path: Path) -> None:
    """Write a ``.pt2`` file, which ``torch.export.load`` reads."""
    with quiet():
        torch.export.save(program, str(path), extra_files={RECORD_NAME: record.to_json()})


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write an ONNX file by torch's exporter.

    Raises:
        ImportError: onnx or onnxscript are not installed.
        ValueError: an operation of the model has no counterpart in ONNX.
    """
    onnx = import_extra("onnx")
    import_extra("onnxscript")
    outputs = (*OUTPUTS, MASKS)[: len(program.graph_signature.user_outputs)]
    try:
        with torch.no_grad(), quiet():
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"the model cannot be written as ONNX: {reason}") from error
    assert written is not None  # it is, unless a file is named
    model = written.model_proto
    _name_axes(model.graph)
    onnx.save(model, str(path))


def _name_axes(graph: Any) -> None:
    """Name the variable axes after what they are, instead of ``s34``."""
    names = {}
    for value in (*graph.input, *(x for x in graph.output if x.name in _AXES)):
        for axis, name in zip(value.type.tensor_type.shape.dim, _AXES[value.name], strict=True):
            if name and axis.dim_param:
                names[axis.dim_param] = name
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in names:  # writing "" would clear a number
                axis.dim_param = names[axis.dim_param]


def add_onnx_record(path: Path, record: ExportRecord) -> None:
    """Write the record into the metadata of an ONNX file."""
    onnx = import_extra("onnx")
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {RECORD_NAME: record.to_json()})
    onnx.save(model, str(path))


def write_openvino(onnx_file: Path, record: ExportRecord, path: Path) -> None:
    """Convert an ONNX file to OpenVINO's ``.xml`` and, beside it, ``.bin``."""
    openvino = import_extra("openvino")
    model = openvino.Core().read_model(str(onnx_file))  # convert_model would send telemetry
    model.set_rt_info(record.to_json(), RECORD_NAME)
    openvino.save_model(model, str(path), compress_to_fp16=record.precision == "float16")


def import_extra(name: str) -> Any:
    """Import a package of the extra ``export``.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"export needs {name}: pip install 'miti_detr[export]'") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print and warn about their own internals."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
