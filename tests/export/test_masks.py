"""Masks of exported models are those of the model."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from miti_detr import load_predictor
from miti_detr.cli.main import main
from miti_detr.export import ExportOptions, TensorDetector, export, export_model
from miti_detr.export.parity import compare
from miti_detr.modeling import MitiDetr
from miti_detr.modeling.segmentation import SegmentationDetr
from miti_detr.predict.backends import SessionBackend, pack
from miti_detr.predict.record import ExportRecord
from miti_detr.predict.sessions import Session, open_session
from tests.export.helpers import SIZES, assert_same_masks, items, noise
from tests.export.test_tensor_detector import SHAPES, batch
from tests.fill import filled
from tests.modeling.segmentation.helpers import mask_model as build_mask_model
from tests.small_shapes import small_shapes


def session_of(model: MitiDetr, record: ExportRecord, top_k: int | None = None) -> Session:
    """A stand-in for an exported file: the module of tensors that would be recorded."""
    detector = TensorDetector(model, masks="masks" in record.outputs, top_k=top_k)

    def run(images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            found = detector(torch.from_numpy(images), torch.from_numpy(sizes))
        return tuple(field.numpy() for field in found)

    return Session(run, record, "torch")


@pytest.mark.slow
def test_masks_of_an_onnx_file(
    mask_onnx_file: Path, mask_record: ExportRecord, mask_model: SegmentationDetr
) -> None:
    """Their logits were compared by the export; here the masks of a padded batch are."""
    session = open_session(mask_onnx_file)
    assert session.record == mask_record
    assert_same_masks(session, mask_model)


@pytest.mark.slow
def test_a_predictor_of_a_file(mask_onnx_file: Path, mask_weights: str) -> None:
    """Resized images, several of one shape, and a threshold."""
    images = [noise(60, 120), noise(200, 90), noise(60, 120)]
    exported, eager = (
        load_predictor(file, threshold=0.7) for file in (mask_onnx_file, mask_weights)
    )
    results = exported(images, channels="RGB"), eager(images, channels="RGB")
    for found, wanted in zip(*results, strict=True):
        masks = wanted.pred_masks.numpy()
        assert found.pred_masks.dtype == bool
        assert found.pred_masks.shape == masks.shape
        assert (found.pred_masks == masks).mean() > 0.9999
        assert all("segmentation" in one for one in found.to_coco())
    assert 0 < sum(len(found) for found in results[0]) < 3 * 7
    with pytest.raises(ValueError, match="masks are not joined over tiles"):
        load_predictor(mask_onnx_file, tile=64)


@pytest.mark.slow
def test_the_file_names_the_masks(mask_onnx_file: Path) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(mask_onnx_file))
    shape = graph.graph.output[3].type.tensor_type.shape
    assert [x.name for x in graph.graph.output] == ["boxes", "scores", "labels", "masks"]
    axes = [axis.dim_param or axis.dim_value for axis in shape.dim]
    assert axes == ["batch", 7, "mask_height", "mask_width"]
    written = json.loads(graph.metadata_props[0].value)
    assert written["outputs"] == ["boxes", "scores", "labels", "masks"]
    assert (written["size_divisibility"], written["square_size"]) == (32, 0)


@pytest.mark.parametrize(
    ("divisor", "square", "padded"), [(1, 0, (50, 71)), (32, 0, (64, 96)), (16, 128, (128, 128))]
)
def test_what_masks_cover(divisor: int, square: int, padded: tuple[int, int]) -> None:
    record = ExportRecord(
        "0", {}, [], [], "RGB", [], [], 0, 0, size_divisibility=divisor, square_size=square
    )
    assert record.padded(50, 71) == padded
    assert ExportRecord.from_json(record.to_json(), "file") == record


def test_wrong_masks_are_noticed(mask_model: SegmentationDetr, mask_record: ExportRecord) -> None:
    """Boxes and scores are right."""
    session = session_of(mask_model, mask_record)
    assert not compare(mask_model, session).exceeds(1e-5)

    def swapped(images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        *others, masks = session.run(images, sizes)
        return (*others, masks[:, ::-1])

    parity = compare(mask_model, session._replace(run=swapped))
    assert max(parity[:2]) < 1e-5
    assert parity.masks > 0.1
    assert parity.exceeds(1e-2)


def test_the_best_detections(
    mask_model: SegmentationDetr, mask_record: ExportRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In descending order, with their masks, of which a few are computed at once."""
    given = batch(SHAPES[1])
    with torch.no_grad():
        every = TensorDetector(mask_model, masks=True)(*given)
        monkeypatch.setattr("miti_detr.export.tensor_detector.CHUNK", 2)
        best = TensorDetector(mask_model, masks=True, top_k=3)(*given)
        without_masks = TensorDetector(mask_model, top_k=3)(*given)
        more = TensorDetector(mask_model, top_k=50)(*given)
    order = every[1].argsort(1, descending=True)[:, :3]
    rows = torch.arange(len(order))[:, None]
    assert_close(list(best), [field[rows, order] for field in every], rtol=1e-5, atol=1e-4)
    assert_close(without_masks, best[:3])
    assert more[1].shape == every[1].shape
    session = session_of(mask_model, mask_record, top_k=3)
    assert not compare(mask_model, session, top_k=3).exceeds(1e-5)
    assert compare(mask_model, session).exceeds(1e-2)


def test_a_trace_with_masks(mask_model: SegmentationDetr) -> None:
    detector = TensorDetector(mask_model, masks=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(detector, batch(SHAPES[1]), check_trace=False)
        for sizes in SHAPES:
            assert_close(traced(*batch(sizes)), detector(*batch(sizes)), rtol=0, atol=2e-4)


def test_half_precision_changes_masks_little(mask_model: SegmentationDetr) -> None:
    with torch.no_grad():
        half = TensorDetector(mask_model, half=True, masks=True)(*batch(SHAPES[1]))[3]
        full = TensorDetector(mask_model, masks=True)(*batch(SHAPES[1]))[3]
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()


def test_only_objects_of_a_panoptic_model(mask_record: ExportRecord) -> None:
    model = build_mask_model("MODEL.DETR.STUFF_CLASSES", [1, 2], "MODEL.ACCELERATE", False).eval()
    model.load_state_dict(filled(model.state_dict()))
    given = [torch.from_numpy(x) for x in pack(items(SIZES))]
    with torch.no_grad():
        _, scores, labels = TensorDetector(model)(*given)
        _, best, _ = TensorDetector(model, top_k=2)(*given)
    assert ((scores == 0) == (labels != 0)).all()
    assert 0 < (labels == 0).sum() < labels.numel()
    assert_close(best, scores.topk(2).values)
    values = {**mask_record.__dict__, "variant": model.variant, "size_divisibility": 1}
    session = session_of(model, ExportRecord(**values))
    parity = compare(model, session)
    assert parity.masks is not None
    assert not parity.exceeds(1e-5)
    found = SessionBackend(session).detect(items(SIZES))
    with torch.no_grad():
        wanted = [x["instances"] for x in model(items(SIZES))]
    assert [x.classes.tolist() for x in found] == [x.pred_classes.tolist() for x in wanted]


@pytest.fixture
def file_less(
    mask_model: SegmentationDetr, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], ExportRecord]:
    """Exports write the record only, and are computed by the module of tensors."""
    records: list[ExportRecord] = []

    def write(detector: object, record: ExportRecord, path: Path, options: ExportOptions) -> None:
        path.write_text("graph")
        records.append(record)

    monkeypatch.setattr(export, "_write", write)
    monkeypatch.setattr(export, "open_session", lambda *_: session_of(mask_model, records[-1]))
    return records.pop


def test_the_difference_of_ap(
    mask_weights: str, file_less: Callable[[], ExportRecord], tmp_path: Path
) -> None:
    lines: list[str] = []
    with small_shapes(tmp_path):
        options = ExportOptions(dataset="shapes_val")
        export_model(mask_weights, tmp_path / "model.onnx", options, say=lines.append)
    assert "mask logits by" in lines[1]
    ap = r"AP on shapes_val: model (\d+\.\d\d), exported \1, difference [+-]0\.00"
    assert re.fullmatch(ap, lines[2])
    assert re.fullmatch(f"mask {ap}", lines[3])


def test_masks_can_be_left_out(
    mask_weights: str,
    model: MitiDetr,
    file_less: Callable[[], ExportRecord],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["export", mask_weights, "--format", "onnx", "--no-masks"]
    assert main([*command, "--output", str(tmp_path / "model.onnx")]) == 0
    assert "mask logits" not in capsys.readouterr().out
    assert file_less().outputs == ("boxes", "scores", "labels")
    with pytest.raises(ValueError, match="the model has no masks"):
        TensorDetector(model, masks=True)
