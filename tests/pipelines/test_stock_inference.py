from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count_table
from detectron2.utils.visualizer import Visualizer

from miti_detr.checkpoint import CheckpointError


@pytest.fixture
def image(shapes: Path) -> np.ndarray:
    """(H, W, 3) uint8, BGR, as ``cv2.imread`` reads it."""
    return read_image(str(shapes / "val" / "000001.png"), format="BGR")


def test_default_predictor(cfg: CfgNode, weights: str, image: np.ndarray) -> None:
    """Boxes in the frame of the given image; the model's RGB is taken care of by INPUT.FORMAT."""
    cfg.MODEL.WEIGHTS = weights
    predictor = DefaultPredictor(cfg)
    instances = predictor(image)["instances"]
    assert instances.image_size == image.shape[:2]
    assert len(instances) <= cfg.MODEL.DETR.NUM_OBJECT_QUERIES
    corners = instances.pred_boxes.tensor
    height, width = image.shape[:2]
    assert (corners >= 0).all()
    assert (corners <= torch.tensor([width, height, width, height])).all()
    swapped = predictor(image[:, :, ::-1])["instances"]
    assert (swapped.scores[:3] - instances.scores[:3]).abs().max() > 0


def test_default_predictor_refuses_weights_of_another_function(
    cfg: CfgNode, weights: str, image: np.ndarray
) -> None:
    cfg.MODEL.WEIGHTS, cfg.MODEL.DETR.LAYER_RESIDUAL = weights, "none"
    predictor = DefaultPredictor(cfg)
    with pytest.raises(CheckpointError, match=r"these are Miti-DETR.*the model is DETR"):
        predictor(image)


def test_inference_on_dataset_with_coco_evaluator(
    cfg: CfgNode, weights: str, tmp_path: Path
) -> None:
    model = build_model(cfg)
    DetectionCheckpointer(model.eval()).load(weights)
    loader = build_detection_test_loader(cfg, "shapes_val")
    evaluator = COCOEvaluator("shapes_val", output_dir=str(tmp_path))
    results = inference_on_dataset(model, loader, evaluator)
    assert set(results["bbox"]) >= {"AP", "AP50", "AP75", "AP-circle"}
    assert (tmp_path / "coco_instances_results.json").stat().st_size > 100


def test_visualizer(cfg: CfgNode, weights: str, image: np.ndarray) -> None:
    cfg.MODEL.WEIGHTS = weights
    instances = DefaultPredictor(cfg)(image)["instances"]
    visualizer = Visualizer(image[:, :, ::-1], MetadataCatalog.get("shapes_val"), scale=2.0)
    picture = visualizer.draw_instance_predictions(instances.to("cpu")).get_image()
    assert picture.shape == (2 * image.shape[0], 2 * image.shape[1], 3)
    plain = Visualizer(image[:, :, ::-1], scale=2.0).output.get_image()
    assert (picture != plain).any() == (len(instances) > 0)
    assert len(instances) > 0


@pytest.mark.slow
def test_flops_and_parameters(cfg: CfgNode) -> None:
    """Of fvcore. ``query_embed`` has Q C = 7 * 32 parameters; the class head costs Q C (K + 1)."""
    model = build_model(cfg).eval()
    table = parameter_count_table(model)
    assert "query_embed.weight" in table
    assert "(7, 32)" in table
    flops = FlopCountAnalysis(model, [{"image": torch.zeros(3, 64, 96)}])
    assert flops.by_module()["model.class_embed"] == 7 * 32 * 4
    assert flops.total() > 1e7
