"""A tiny model as a checkpoint and, exported once, as ONNX and OpenVINO."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from detectron2.modeling import build_model
from torch.export import ExportedProgram

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.export import TensorDetector, export_model
from miti_detr.export.writers import record_program, write_openvino
from miti_detr.modeling import MitiDetr
from miti_detr.predict.sessions import open_session
from tests.fill import filled
from tests.helpers import tiny_config


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint whose detections differ from query to query and image to image."""
    folder = tmp_path_factory.mktemp("weights")
    layers = ("MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1)
    cfg = tiny_config(*layers, "MODEL.RESNETS.OUT_FEATURES", ["res2"])  # exporters are slow
    model = build_model(cfg)
    model.load_state_dict(filled(model.state_dict()))
    MitiDetrCheckpointer(model, str(folder), cfg=cfg).save("tiny")
    return str(folder / "tiny.pth")


@pytest.fixture(scope="session")
def model(weights: str) -> MitiDetr:
    """The plain model of the checkpoint."""
    cfg = load_config(weights=weights, overrides=["MODEL.ACCELERATE", "False"])
    return Predictor(cfg).model


@pytest.fixture(scope="session")
def program(model: MitiDetr) -> ExportedProgram:
    """The recorded model, which takes seconds."""
    return record_program(TensorDetector(model), shape=None, image_type="uint8")


@pytest.fixture(scope="session")
def recorded(program: ExportedProgram) -> Iterator[None]:
    """Exports take this program instead of recording another one."""
    with mock.patch("miti_detr.export.export.record_program", return_value=program):
        yield


@pytest.fixture(scope="session")
def onnx_file(weights: str, recorded: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_model(weights, tmp_path_factory.mktemp("export") / "tiny.onnx")


@pytest.fixture(scope="session")
def xml_file(onnx_file: Path) -> Path:
    path = onnx_file.with_suffix(".xml")
    write_openvino(onnx_file, open_session(onnx_file).record, path)
    return path
