"""Exported models as functions of arrays: ONNX Runtime, OpenVINO, torch.export.

A session maps ``images`` (N, 3, H, W) uint8 and ``sizes`` (N, 2) int64 (height and width of each
image in pixels, the rest is padding) to ``boxes`` (N, D, 4), ``scores`` (N, D), ``labels`` (N, D)
and, if the record names them, ``masks`` (N, D, h', w'). It may be called from several threads.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .record import RECORD_NAME, ExportRecord

Outputs = tuple[np.ndarray, ...]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Session(NamedTuple):
    """An exported model that is ready to run.

    Attributes:
        run: images and sizes to the outputs that the record names.
        record: of the file.
        provider: what computes, in words.
    """

    run: Callable[[np.ndarray, np.ndarray], Outputs]
    record: ExportRecord
    provider: str


def open_session(path: str | os.PathLike[str], device: str | None = None) -> Session:
    """Open an exported file; its name says which kind it is.

    Args:
        path: ``.onnx``, ``.xml`` (OpenVINO) or ``.pt2`` (torch.export).
        device: ``cpu``, ``cuda``, ``cuda:1`` or ``tensorrt``; None: the GPU if the installed
            runtime supports one, else the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the runtime is not installed.
        ValueError: the device cannot be used, or the file was not written by ``miti-detr export``.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    return SESSIONS[os.path.splitext(path)[1].lower()](path, device)


def _open_onnx(path: str, device: str | None) -> Session:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{path} needs `pip install onnxruntime`") from error
    available = onnxruntime.get_available_providers()
    if device is None:
        device = "cuda" if _PROVIDERS["cuda"] in available else "cpu"
    kind, _, index = device.partition(":")
    provider = _PROVIDERS.get(kind)
    if provider not in available:
        have = [name for name, wanted in _PROVIDERS.items() if wanted in available]
        raise ValueError(
            f"the installed onnxruntime cannot compute on {device!r}. It can use {have}; for GPUs "
            "install onnxruntime-gpu."
        )
    options = {"device_id": index} if index else {}
    try:
        session = onnxruntime.InferenceSession(path, providers=[(provider, options)])
    except Exception as error:  # the runtime has its own classes
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"onnxruntime cannot open {path}: {reason}") from error
    # A provider that cannot start is replaced by the CPU without an error.
    if session.get_providers()[0] != provider:
        raise ValueError(
            f"onnxruntime has {provider}, but it did not start; {path} would run on the CPU. "
            "Install the libraries that it needs, or choose device cpu."
        )
    session.disable_fallback()
    text = session.get_modelmeta().custom_metadata_map.get(RECORD_NAME)
    record = ExportRecord.from_json(text, path)

    def run(images: np.ndarray, sizes: np.ndarray) -> Outputs:
        return tuple(session.run(list(record.outputs), {"images": images, "sizes": sizes}))

    return Session(run, record, f"onnxruntime {provider}")


def _open_openvino(path: str, device: str | None) -> Session:
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"{path} needs `pip install openvino`") from error
    target = (device or "cpu").upper()
    core = openvino.Core()
    if target.partition(":")[0] not in core.available_devices:
        raise ValueError(
            f"OpenVINO cannot compute on {device!r}. It can use "
            f"{[name.lower() for name in core.available_devices]}."
        )
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"OpenVINO cannot open {path}: {reason}") from error
    text = str(model.get_rt_info(RECORD_NAME).value) if model.has_rt_info(RECORD_NAME) else None
    record = ExportRecord.from_json(text, path)
    # Without the hint, processors with bfloat16 instructions compute in bfloat16.
    hint = {"INFERENCE_PRECISION_HINT": "f16" if record.precision == "float16" else "f32"}
    if target == "CPU":
        hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, target, hint)

    def run(images: np.ndarray, sizes: np.ndarray) -> Outputs:
        request = compiled.create_infer_request()  # one request serves one thread
        result = request.infer({"images": images, "sizes": sizes})
        return tuple(np.array(result[name]) for name in record.outputs)

    return Session(run, record, f"OpenVINO {target}")


def _open_program(path: str, device: str | None) -> Session:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"{path} needs torch") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"there is no CUDA device for device {device!r}. Use cpu.")
    extra = {RECORD_NAME: ""}
    program = torch.export.load(path, extra_files=extra)
    record = ExportRecord.from_json(extra[RECORD_NAME], path)
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()

    def run(images: np.ndarray, sizes: np.ndarray) -> Outputs:
        with torch.no_grad():
            arrays = (torch.from_numpy(array).to(device) for array in (images, sizes))
            return tuple(output.cpu().numpy() for output in module(*arrays))

    return Session(run, record, f"torch {device}")


SESSIONS: dict[str, Callable[[str, str | None], Session]] = {
    ".onnx": _open_onnx,
    ".xml": _open_openvino,
    ".pt2": _open_program,
}
