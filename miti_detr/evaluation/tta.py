"""Test-time augmentation: detections in flipped and resized views of an image, merged to one set.

V views of an image, M detections in a view.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.transforms import HFlipTransform
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

SAME_OBJECT = 0.5  # least IoU of the boxes of one object in two views
_LEAST = 1e-12  # score as a weight


class MitiDetrWithTTA(nn.Module):
    """A model of this package that looks at each image several times.

    It is called as the model is, with images that are not resized yet; see :func:`tta_config`. The
    counterpart for this package's models of Detectron2's ``GeneralizedRCNNWithTTA``.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """Take a model of boxes.

        Args:
            cfg: reads ``TEST.AUG``: the shorter sides ``MIN_SIZES`` and the longest side
                ``MAX_SIZE`` of the views in pixels, and ``FLIP``, which adds a mirrored view of
                each size.
            model: returns ``{"instances": Instances}`` for each input.
        """
        super().__init__()
        self.model = model
        self.views = DatasetMapperTTA(cfg)
        self.train(model.training)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detect in all views of each image.

        Args:
            batched_inputs: as the model takes them. The views are made from ``image``, and the
                first view of all images is one batch, then the second one, and so on.

        Returns:
            As the model does; see :func:`merge_views`.
        """
        images = [self.views({**_size(x), **x}) for x in batched_inputs]
        found: list[list[Instances]] = []
        for batch in zip(*images, strict=True):
            mirrored = [_is_mirrored(view.pop("transforms")) for view in batch]
            outputs = [output["instances"] for output in self.model(list(batch))]
            pairs = zip(outputs, mirrored, strict=True)
            found.append([mirror(one) if was else one for one, was in pairs])
        return [{"instances": merge_views(views)} for views in zip(*found, strict=True)]


def tta_config(cfg: CfgNode) -> CfgNode:
    """Return the config of an evaluation with test-time augmentation.

    Images are read in their full size, so that each view is resized once. Results are written to
    ``OUTPUT_DIR/TTA``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.TEST.LOSS = False
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "TTA")
    cfg.freeze()
    return cfg


def mirror(instances: Instances) -> Instances:
    """Exchange left and right of the boxes of an image."""
    width = instances.image_size[1]
    left, top, right, bottom = instances.pred_boxes.tensor.unbind(1)
    mirrored = Instances(instances.image_size, **instances.get_fields())
    mirrored.pred_boxes = Boxes(torch.stack([width - right, top, width - left, bottom], dim=1))
    return mirrored


def merge_views(views: Sequence[Instances]) -> Instances:
    """Merge the detections of several views of an image.

    The detections of each view are matched one to one with the objects that the views before it
    have found: of the same class, with an IoU of at least :data:`SAME_OBJECT`, so that the sum of
    IoU and scores is largest. What is not matched is a further object.

    Args:
        views: with ``pred_boxes``, ``scores`` and ``pred_classes``, all in the frame of the image.

    Returns:
        Of a single view its detections as they are. Otherwise for each object the mean of its
        boxes, weighted by their scores, and the mean of its scores, where a view that does not have
        the object counts as 0; in descending order of the scores, and at most as many as the
        largest of the views has.
    """
    first, *others = views
    if not others:
        return first
    scores, boxes = _scores_and_sums(first)
    classes = first.pred_classes
    for view in others:
        more = _scores_and_sums(view)
        old, new = _match(Boxes(boxes / scores[:, None]), scores, classes, view)
        kept = torch.ones_like(more[0], dtype=torch.bool).index_fill(0, new, False)
        scores = torch.cat([scores.index_add(0, old, more[0][new]), more[0][kept]])
        boxes = torch.cat([boxes.index_add(0, old, more[1][new]), more[1][kept]])
        classes = torch.cat([classes, view.pred_classes[kept]])
    best = scores.argsort(descending=True, stable=True)[: max(map(len, views))]
    return Instances(
        first.image_size,
        pred_boxes=Boxes((boxes / scores[:, None])[best]),
        scores=scores[best] / len(views),
        pred_classes=classes[best],
    )


def _scores_and_sums(view: Instances) -> tuple[Tensor, Tensor]:
    """Scores (M,), above 0, and boxes (M, 4) multiplied by them."""
    scores = view.scores.clamp(min=_LEAST)
    return scores, view.pred_boxes.tensor * scores[:, None]


def _match(boxes: Boxes, scores: Tensor, classes: Tensor, view: Instances) -> tuple[Tensor, Tensor]:
    """Pairs of objects and detections of a view: indices of both."""
    similar = pairwise_iou(boxes, view.pred_boxes)
    same = (similar >= SAME_OBJECT) & (classes[:, None] == view.pred_classes)
    value = same * similar * (scores[:, None] * view.scores).sqrt()
    rows, columns = (
        torch.from_numpy(x).to(scores.device)
        for x in linear_sum_assignment(value.cpu().numpy(), maximize=True)
    )
    is_pair = value[rows, columns] > 0
    return rows[is_pair], columns[is_pair]


def _is_mirrored(transforms: Any) -> bool:
    return any(isinstance(one, HFlipTransform) for one in transforms.transforms)


def _size(inputs: dict[str, Any]) -> dict[str, int]:
    height, width = inputs["image"].shape[-2:]
    return {"height": int(height), "width": int(width)}
