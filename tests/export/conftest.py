"""Tiny models, with masks and without, as checkpoints and, exported once, as other files."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from detectron2.modeling import build_model
from torch.export import ExportedProgram

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.export import ExportOptions, TensorDetector, export_model
from miti_detr.export.export import make_record
from miti_detr.export.writers import record_program, write_openvino
from miti_detr.modeling import MitiDetr
from miti_detr.modeling.segmentation import SegmentationDetr
from miti_detr.predict.record import ExportRecord
from tests.fill import filled
from tests.helpers import tiny_config
from tests.modeling.segmentation.helpers import mask_config, sharpen


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
def mask_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with masks, whose batches are padded to multiples of 32 pixels."""
    folder = tmp_path_factory.mktemp("mask_weights")
    layers = ("MODEL.DETR.ENC_LAYERS", 1, "MODEL.DETR.DEC_LAYERS", 1)
    cfg = mask_config(*layers, "MODEL.DETR.SIZE_DIVISIBILITY", 32)
    model = build_model(cfg)
    model.load_state_dict(filled(model.state_dict()))
    sharpen(model)
    MitiDetrCheckpointer(model, str(folder), cfg=cfg).save("masks")
    return str(folder / "masks.pth")


@pytest.fixture(scope="session")
def mask_model(mask_weights: str) -> SegmentationDetr:
    """The plain model with masks."""
    cfg = load_config(weights=mask_weights, overrides=["MODEL.ACCELERATE", "False"])
    return Predictor(cfg).model


@pytest.fixture(scope="session")
def mask_record(mask_weights: str, mask_model: SegmentationDetr) -> ExportRecord:
    """What the files say about it."""
    return make_record(load_config(weights=mask_weights), mask_model, ExportOptions())


@pytest.fixture(scope="session")
def mask_program(mask_model: SegmentationDetr) -> ExportedProgram:
    """The recorded model with masks."""
    return record_program(TensorDetector(mask_model, masks=True), shape=None, image_type="uint8")


@pytest.fixture(scope="session")
def mask_onnx_file(
    mask_weights: str, mask_program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("export") / "masks.onnx"
    with mock.patch("miti_detr.export.export.record_program", return_value=mask_program):
        return export_model(mask_weights, path)


@pytest.fixture(scope="session")
def xml_file(mask_onnx_file: Path, mask_record: ExportRecord) -> Path:
    path = mask_onnx_file.with_suffix(".xml")
    write_openvino(mask_onnx_file, mask_record, path)
    return path
