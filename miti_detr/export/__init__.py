"""Export of trained models to torch.export, ONNX and OpenVINO, compared with the model itself."""

from .export import ExportOptions, export_model
from .tensor_detector import TensorDetector

__all__ = ["ExportOptions", "TensorDetector", "export_model"]
