import torch

from miti_detr.layers import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh, generalized_box_iou


def test_formats_are_inverse():
    boxes = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(boxes)), boxes, rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        box_cxcywh_to_xyxy(torch.tensor([0.5, 0.4, 0.2, 0.6])),
        torch.tensor([0.4, 0.1, 0.6, 0.7]),
        rtol=0,
        atol=1e-7,
    )


def test_giou_of_known_boxes():
    """Unit squares shifted by 1/2: IoU (1/2) / (3/2) = 1/3, hull = union, GIoU = 1/3.

    Shifted by 2: IoU 0, union 2, hull 3, GIoU = -1/3. A square in itself: 1.
    """
    unit = torch.tensor([[0.0, 0, 1, 1]])
    others = torch.tensor([[0.5, 0, 1.5, 1], [2.0, 0, 3, 1], [0.0, 0, 1, 1]])
    expected = torch.tensor([1 / 3, -1 / 3, 1.0])
    torch.testing.assert_close(generalized_box_iou(unit, others), expected, rtol=0, atol=1e-6)
    pairs = generalized_box_iou(others[:, None], others[None])
    torch.testing.assert_close(pairs, pairs.T, rtol=0, atol=0)
    torch.testing.assert_close(pairs[2], expected, rtol=0, atol=1e-6)


def test_giou_of_boxes_without_area_is_finite_with_finite_gradient():
    point = torch.zeros(1, 4, requires_grad=True)
    line = torch.tensor([[0.0, 0, 1, 0]])
    value = generalized_box_iou(point, point) + generalized_box_iou(point, line)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(point.grad).all()
