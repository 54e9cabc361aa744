"""Masks of predictions: pictures, COCO results, checkpoints."""

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from pycocotools import mask as mask_util
from torch.testing import assert_close

from miti_detr import load_predictor
from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.modeling.segmentation import resize_logits
from miti_detr.predict import DetectionPredictor, Found
from miti_detr.predict.job import predict_files
from miti_detr.predict.masks import GridMasks, run_lengths
from miti_detr.visualize.drawing import class_colour
from tests.fill import filled
from tests.helpers import tiny_config
from tests.predict.conftest import FixedBackend
from tests.predict.test_job import make_image
from tests.visualize.test_drawing import GREY, grey


class MaskBackend(FixedBackend):
    """The mask of each box is its upper half."""

    with_masks = True

    def detect(self, items: Sequence[dict[str, Any]]) -> list[Found]:
        return [
            found._replace(masks=np.stack([self._mask(box, item) for box in found.boxes]))
            for found, item in zip(super().detect(items), items, strict=True)
        ]

    def _mask(self, box: np.ndarray, item: dict[str, Any]) -> np.ndarray:
        mask = np.zeros((item["height"], item["width"]), dtype=bool)
        mask[: int(box[3]) // 2, : int(box[2])] = True
        return mask


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_are_those_of_pycocotools(density: float) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (60, 200), (300, 1)):
        masks = rng.random((3, height, width)) < density
        masks[0, : height // 2] = density > 0
        wanted = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
        found = run_lengths(masks)
        assert [x["counts"] for x in found] == [x["counts"].decode() for x in wanted]
        assert all(x["size"] == [height, width] for x in found)
        assert run_lengths(found) is found
    assert len(run_lengths(np.zeros((0, 4, 4), dtype=bool))) == 0


@pytest.mark.parametrize("output", [(60, 100), (33, 21), (200, 250)])
def test_grids_become_the_masks_of_the_model(output: tuple[int, int]) -> None:
    """The padding is cut off before the second resize; logits near 0 may round to either side."""
    logits = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(0))
    padded, image = (68, 128), (60, 100)
    resized = resize_logits(logits, padded=padded, image=image, output=output)
    grid = GridMasks(logits.numpy(), padded, image, output)
    sure = resized.abs() > 1e-5
    assert_close(torch.from_numpy(grid.pixels())[sure], (resized > 0)[sure])
    assert sure.float().mean() > 0.99
    assert (grid[[2]].pixels() == grid.pixels()[2:]).all()


def test_results_have_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    result = DetectionPredictor(MaskBackend())(grey(40, 30))
    assert result.masks.shape == (1, 30, 40)
    assert result.masks[0, :15, :20].all()
    assert result.masks.sum() == 15 * 20
    (coco,) = result.to_coco()
    assert mask_util.decode(coco["segmentation"]).astype(bool).tolist() == result.masks[0].tolist()
    assert (result[:0].masks.shape, result[:0].to_coco()) == ((0, 30, 40), [])
    stub = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stub)
    assert result.to_supervision()["mask"] is result.masks


def test_masks_are_drawn() -> None:
    picture = DetectionPredictor(MaskBackend())(grey(400, 300)).draw()
    assert picture.getpixel((150, 149)) == class_colour(1)  # the edge of the mask
    assert picture.getpixel((150, 120)) not in (GREY, class_colour(1))  # tinted
    assert picture.getpixel((150, 200)) == picture.getpixel((300, 200)) == GREY


@pytest.mark.parametrize("format", ["coco", "jsonl", "csv", "yolo"])
def test_a_job_writes_run_lengths(tmp_path: Path, format: str) -> None:
    """CSV and YOLO have boxes only."""
    images = [make_image(tmp_path / "in/a.png", 40, 30), make_image(tmp_path / "in/b.png", 20, 10)]
    summary = predict_files(
        DetectionPredictor(MaskBackend()), images, tmp_path / "out", format=format
    )
    if format in ("csv", "yolo"):
        assert summary.detections == 2
        return
    lines = summary.output.read_text()
    results = (
        json.loads(lines)
        if format == "coco"
        else [json.loads(line)["detections"][0] for line in lines.splitlines()]
    )
    masks = [mask_util.decode(result["segmentation"]) for result in results]
    assert [(x.shape, int(x.sum())) for x in masks] == [((30, 40), 300), ((10, 20), 50)]


def test_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="tile is 20, but masks are not joined"):
        DetectionPredictor(MaskBackend(), tile=20)


def test_a_checkpoint_with_masks(tmp_path: Path) -> None:
    """The masks are those of the engine's predictor, and computed of kept detections only."""
    cfg = tiny_config("MODEL.MASK_ON", True, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"])
    model = build_model(cfg)
    model.load_state_dict(filled(model.state_dict()))
    MitiDetrCheckpointer(model, str(tmp_path), cfg=cfg).save("tiny")
    weights = str(tmp_path / "tiny.pth")
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    (wanted,) = Predictor(load_config(weights=weights))([image])
    wanted = wanted[wanted.scores.argsort(descending=True, stable=True)]
    rle = ("TEST.MASK_FORMAT", "rle")  # of an evaluation
    result = load_predictor(weights, threshold=0.0, overrides=rle)(image, channels="RGB")
    assert_close(result.scores, wanted.scores, rtol=0, atol=1e-5)
    assert (result.masks == wanted.pred_masks.numpy()).mean() > 0.999
    assert result[:1].masks.shape == (1, 60, 90)
    threshold = float(wanted.scores[2]) - 1e-4
    few = load_predictor(weights, threshold=threshold)
    assert len(few(image, channels="RGB")) == int((wanted.scores >= threshold).sum())
    assert few.backend._predictor.model.min_score == threshold  # type: ignore[attr-defined]
    assert load_predictor(weights).backend._predictor.model.min_score == 0.5  # type: ignore[attr-defined]
