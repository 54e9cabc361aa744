import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import given
from hypothesis import strategies as st
from torch.export import ExportedProgram

from miti_detr import load_predictor
from miti_detr.cli.main import main
from miti_detr.export import ExportOptions, export, export_model
from miti_detr.export.parity import Parity, compare, one_way
from miti_detr.export.writers import write_program
from miti_detr.modeling import MitiDetr
from miti_detr.modeling.segmentation import SegmentationDetr
from miti_detr.predict.backends import resized
from miti_detr.predict.record import ExportRecord
from miti_detr.predict.sessions import open_session
from tests.export.helpers import assert_same_masks, noise
from tests.small_shapes import small_shapes


def difference(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], scale: np.ndarray
) -> Parity:
    """Compare the detections of an image in both directions."""
    return Parity.joined([one_way(first, second, scale), one_way(second, first, scale)])


@pytest.mark.slow
def test_an_onnx_file_predicts_as_the_checkpoint_does(weights: str, onnx_file: Path) -> None:
    exported, eager = (load_predictor(file, threshold=0.0) for file in (onnx_file, weights))
    assert exported.provider == "onnxruntime CPUExecutionProvider"
    images = [noise(60, 120), noise(200, 90), noise(75, 75), noise(60, 120)]
    pairs = zip(exported(images, channels="BGR"), eager(images, channels="BGR"), strict=True)
    for found, wanted in pairs:
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found.boxes, wanted.boxes, rtol=0, atol=1e-4 * 200)
        assert found.class_names == wanted.class_names
        ids = [[result["category_id"] for result in x.to_coco()] for x in (found, wanted)]
        assert ids[0] == ids[1]
        assert found.image_size == wanted.image_size
    assert exported(images[0], channels="RGB")[:2].draw().size == (120, 60)


@pytest.mark.slow
def test_the_file_says_what_it_is(onnx_file: Path, model: MitiDetr) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(onnx_file))
    (entry,) = graph.metadata_props
    record = json.loads(entry.value)
    assert entry.key == "miti_detr"
    assert record["class_names"] == ["circle", "square", "triangle"]
    assert record["category_ids"] == [1, 2, 3]
    assert record["variant"]["layer_residual"] == "before_norm"
    assert record["threshold"] == 0.5
    assert record["pixel_mean"] == model.pixels["pixel_mean"]
    assert graph.opset_import[0].version >= 18
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "sizes": ["batch", 2],
        "boxes": ["batch", 7, 4],
        "scores": ["batch", 7],
        "labels": ["batch", 7],
    }


@pytest.mark.slow
def test_openvino_agrees(xml_file: Path, mask_model: SegmentationDetr) -> None:
    session = open_session(xml_file)
    assert session.provider == "OpenVINO CPU"
    assert not compare(mask_model, session).exceeds(1e-4)
    assert_same_masks(session, mask_model)
    assert load_predictor(xml_file, threshold=0.0)(noise(60, 80), channels="RGB").image_size


@pytest.mark.slow
def test_torch_export_agrees_and_a_missing_mask_is_noticed(
    mask_model: SegmentationDetr,
    mask_program: ExportedProgram,
    mask_record: ExportRecord,
    tmp_path: Path,
) -> None:
    """A graph that takes padding for a part of the image differs by much more than 1e-4."""
    path = tmp_path / "tiny.pt2"
    write_program(mask_program, mask_record, path)
    session = open_session(path)
    assert session.record == mask_record
    assert not compare(mask_model, session).exceeds(1e-5)
    assert_same_masks(session, mask_model)

    def without_sizes(images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        whole = np.full_like(sizes, images.shape[-2:])
        boxes, *others = session.run(images, whole)
        return boxes * (sizes / whole)[:, None, [1, 0, 1, 0]], *others

    assert compare(mask_model, session._replace(run=without_sizes)).exceeds(1e-3)


@pytest.mark.usefixtures("recorded")
def test_a_file_that_differs_is_not_written(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(detector: object, record: ExportRecord, path: Path, options: object) -> None:
        path.write_text("graph")

    monkeypatch.setattr(export, "_write", write)
    monkeypatch.setattr(export, "open_session", lambda path, device: None)
    monkeypatch.setattr(export, "compare", lambda model, session, top_k: Parity(2e-4, 1e-6))
    target = tmp_path / "model.onnx"
    target.write_text("earlier")
    message = r"something else: boxes differ by 2\.0e-04 .*allowed are 1e-04\. No file was written"
    with pytest.raises(ValueError, match=message):
        export_model(weights, target)
    assert target.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [target]


def test_differences_of_detections() -> None:
    """The order does not matter; each detection needs a partner of its class."""
    boxes = np.array([[0.0, 0, 10, 10], [5, 5, 20, 20]])
    scores, labels, scale = np.array([0.9, 0.5]), np.array([0, 1]), np.array([20.0, 20, 20, 20])
    first = (boxes, scores, labels)
    assert difference(first, tuple(x[::-1] for x in first), scale) == Parity(0, 0)
    shifted = difference(first, (boxes + [0, 0, 0.2, 0], scores - 0.1, labels), scale)
    np.testing.assert_allclose(shifted[:2], (0.01, 0.1))
    assert shifted.masks is None
    assert difference(first, (boxes, scores, labels + 1), scale).exceeds(0.9)
    assert difference(first, (boxes[:1], scores[:1], labels[:1]), scale).exceeds(0.5)
    assert difference(first, (boxes * np.nan, scores, labels), scale).exceeds(1.0)
    nothing = (boxes[:0], scores[:0], labels[:0])
    assert difference(first, nothing, scale).exceeds(1.0)
    assert difference(nothing, nothing, scale) == Parity(0, 0)


def test_differences_of_masks() -> None:
    """Those of partners; logits in parts of the largest, and the share of cells."""
    boxes, scale = np.array([[0.0, 0, 10, 10], [5, 5, 20, 20]]), np.array([20.0, 20, 20, 20])
    masks = np.linspace(-4, 4, 2 * 5 * 10).reshape(2, 5, 10)
    first = (boxes, np.array([0.9, 0.5]), np.array([0, 1]), masks)
    assert difference(first, tuple(x[::-1] for x in first), scale) == (0, 0, 0, 0)
    above = difference(first, (*first[:3], masks + 0.1), scale)  # one of 100 cells becomes positive
    np.testing.assert_allclose(above, (0, 0, 0.1 / 4, 0.01), rtol=1e-6)
    assert above.exceeds(1e-2)
    assert not above.exceeds(3e-2)
    assert difference(first, (*first[:3], masks[::-1]), scale).exceeds(0.1)
    assert difference(first, (*first[:3], masks * np.nan), scale).exceeds(1.0)
    assert Parity(0, 0, 0, 2e-3).exceeds(1e-4)
    assert "mask logits by 2.5e-02 of the largest, 1.0e-02 of pixels" in str(above)


@pytest.mark.slow
@pytest.mark.usefixtures("recorded")
def test_int8_and_ap(weights: str, onnx_file: Path, tmp_path: Path) -> None:
    """The quantised file is smaller, and AP of both is stated."""
    lines: list[str] = []

    def copy(program: object, path: Path) -> None:
        shutil.copy(onnx_file, path)

    with small_shapes(tmp_path) as shapes:
        images = sorted((shapes / "train").glob("*.png"))[:2]
        options = ExportOptions(precision="int8", calibration=images)
        with mock.patch("miti_detr.export.export.write_onnx", copy):
            path = export_model(weights, tmp_path / "int8.onnx", options, say=lines.append)
    assert re.fullmatch(
        r"AP on shapes_val: model \d+\.\d\d, exported \d+\.\d\d, difference [+-]\d+\.\d\d", lines[1]
    )
    assert path.stat().st_size < 0.6 * onnx_file.stat().st_size
    assert load_predictor(path).precision == "int8"
    with pytest.raises(ValueError, match="was exported in int8, precision is 'float32'"):
        load_predictor(path, precision="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format is 'tflite'"),
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"precision": "int8"}, "--calibration"),
        ({"format": "torch", "precision": "float16"}, "needs format onnx or openvino"),
        ({"image_type": "bool"}, "image type is 'bool'"),
    ],
)
def test_bad_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportOptions(**options)


@pytest.mark.parametrize(
    ("dataset", "reason"), [("gone", "it is not registered"), ("coco_2017_val", "No such file")]
)
def test_lower_precision_needs_data(weights: str, dataset: str, reason: str) -> None:
    """It is checked before the export."""
    options = ExportOptions(precision="float16", dataset=dataset)
    with pytest.raises(ValueError, match=rf"cannot be measured on .*{dataset}.*{reason}"):
        export_model(weights, "gone/model.onnx", options)
    assert not Path("gone").exists()


def test_the_command_names_bad_input(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", weights, "--format", "onnx", "--output", "model.xml"]) == 1
    assert "model.xml does not end in .onnx" in capsys.readouterr().err
    assert main(["export", "gone.pth", "--format", "torch"]) == 1
    assert "gone.pth" in capsys.readouterr().err


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), least=st.sampled_from([0, 80, 800]))
def test_images_are_resized_as_detectron2_does(height: int, width: int, least: int) -> None:
    if least == 0:
        assert resized(height, width, least, 1333) == (height, width)
        return
    wanted = T.ResizeShortestEdge.get_output_shape(height, width, least, 1333)
    assert resized(height, width, least, 1333) == tuple(max(side, 1) for side in wanted)


def test_files_of_others_are_refused(tmp_path: Path, model: MitiDetr) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "other.onnx"
    path.write_text("no graph")
    with pytest.raises(ValueError, match=r"onnxruntime cannot open .*other\.onnx"):
        open_session(path)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    with pytest.raises(ValueError, match="no record of its classes"):
        open_session(path)


@pytest.mark.slow
def test_a_device_that_is_not_there_is_an_error(onnx_file: Path, xml_file: Path) -> None:
    """Never the CPU in silence."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"cannot compute on 'cuda'\. It can use \['cpu'\]"):
        load_predictor(onnx_file, device="cuda")
    with pytest.raises(ValueError, match="OpenVINO cannot compute on 'gpu'"):
        load_predictor(xml_file, device="gpu")


@pytest.mark.slow
def test_a_provider_that_does_not_start_is_an_error(
    onnx_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime lists CUDA, but falls back to the CPU when the session is made."""
    import onnxruntime

    real = onnxruntime.InferenceSession
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    fallen = lambda path, providers: real(path, providers=["CPUExecutionProvider"])  # noqa: E731
    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen)
    with pytest.raises(ValueError, match="CUDAExecutionProvider, but it did not start"):
        load_predictor(onnx_file)
