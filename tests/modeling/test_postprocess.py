import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess

from miti_detr.modeling import detections
from miti_detr.modeling.postprocess import check_finite
from tests.helpers import load_golden

GOLDEN = load_golden("postprocess")


def run(sizes):
    return detections(GOLDEN["in.logits"], GOLDEN["in.boxes"], [tuple(s) for s in sizes.tolist()])


def test_scores_labels_and_boxes_equal_published():
    for index, result in enumerate(run(GOLDEN["coco.target_sizes_hw"])):
        scores, boxes = GOLDEN["coco.scores"][index].float(), GOLDEN["coco.boxes"][index].float()
        torch.testing.assert_close(result.scores, scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(result.pred_boxes.tensor, boxes, rtol=0, atol=1e-3)
        assert result.pred_classes.tolist() == GOLDEN["coco.labels"][index].tolist()


def test_detectron2_path_equals_published_wrapper():
    results = run(GOLDEN["d2.network_sizes_hw"])
    for index, (result, size) in enumerate(
        zip(results, GOLDEN["d2.output_sizes_hw"].tolist(), strict=True)
    ):
        final = detector_postprocess(result, *size)
        boxes, scores = GOLDEN[f"d2.boxes{index}"], GOLDEN[f"d2.scores{index}"].float()
        torch.testing.assert_close(final.pred_boxes.tensor, boxes.float(), rtol=0, atol=1e-3)
        torch.testing.assert_close(final.scores, scores, rtol=0, atol=1e-6)
        assert final.pred_classes.tolist() == GOLDEN[f"d2.labels{index}"].tolist()
        assert len(GOLDEN[f"d2.kept_queries{index}"]) == len(final)


def test_a_prediction_that_is_not_finite_names_its_image():
    logits, boxes = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5)
    inputs = [{"file_name": "a.png"}, {"file_name": "b.png"}]
    check_finite(detections(logits, boxes, [(8, 8), (8, 8)]), inputs)
    boxes[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match=r"prediction for b\.png is NaN"):
        check_finite(detections(logits, boxes, [(8, 8), (8, 8)]), inputs)
