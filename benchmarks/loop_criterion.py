"""The set loss of DETR as published: a loop over decoder layers and images.

It is written for comparison, independently of the matcher and the losses of ``miti_detr.modeling``,
so that equal results mean something.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from miti_detr.modeling import Target

Match = tuple[Tensor, Tensor]  # indices of queries and objects of one image, each (M,)


class LoopCriterion(nn.Module):
    """Set loss that computes one decoder layer after the other, as published.

    For each layer it computes the cost of every query of the batch for every object of the batch,
    assigns the block of each image, and computes the losses. The GIoU of the pairs is the diagonal
    of the GIoU of all pairs.

    Source: the steps of facebookresearch/detr ``models/matcher.py`` and ``models/detr.py`` at
    29901c5.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        no_object_weight: float = 0.1,
        deep_supervision: bool = True,
    ) -> None:
        """Make the criterion. The arguments are those of :class:`SetCriterion`."""
        super().__init__()
        self.num_classes = num_classes
        self.deep_supervision = deep_supervision
        self.weights = {"loss_ce": class_weight, "loss_bbox": l1_weight, "loss_giou": giou_weight}
        class_weights = torch.ones(num_classes + 1)
        class_weights[-1] = no_object_weight
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Compute the weighted losses of all layers, as :class:`SetCriterion` does."""
        if not self.deep_supervision:
            logits, boxes = logits[-1:], boxes[-1:]
        losses = {}
        for layer in range(len(logits)):
            suffix = "" if layer == len(logits) - 1 else f"_{layer}"
            with torch.autocast(logits.device.type, enabled=False):
                found = self._losses(logits[layer].float(), boxes[layer].float(), targets)
            for name, value in found.items():
                losses[name + suffix] = self.weights[name] * value
        return losses

    def _losses(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Compute the losses of one layer from logits (N, Q, K+1) and boxes (N, Q, 4)."""
        matches = self._match(logits, boxes, targets)
        classes = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        for image, (query, target) in enumerate(matches):
            classes[image, query] = targets[image]["labels"][target]
        ce = F.cross_entropy(logits.transpose(1, 2), classes, self.get_buffer("class_weights"))

        predicted = torch.cat([boxes[image, query] for image, (query, _) in enumerate(matches)])
        truth = torch.cat([t["boxes"][i] for t, (_, i) in zip(targets, matches, strict=True)])
        number = max(sum(len(t["labels"]) for t in targets), 1)
        giou = torch.diag(generalized_box_iou(_corners(predicted), _corners(truth)))
        return {
            "loss_ce": ce,
            "loss_bbox": (predicted - truth).abs().sum() / number,
            "loss_giou": (1 - giou).sum() / number,
        }

    @torch.no_grad()
    def _match(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> list[Match]:
        labels = torch.cat([t["labels"] for t in targets])
        truth = torch.cat([t["boxes"] for t in targets])
        probability = logits.flatten(0, 1).softmax(-1)
        predicted = boxes.flatten(0, 1)
        cost = (
            self.weights["loss_bbox"] * torch.cdist(predicted, truth, p=1)
            - self.weights["loss_ce"] * probability[:, labels]
            - self.weights["loss_giou"] * generalized_box_iou(_corners(predicted), _corners(truth))
        )
        blocks = (
            cost.view(*logits.shape[:2], -1).cpu().split([len(t["labels"]) for t in targets], -1)
        )
        pairs = [linear_sum_assignment(block[image]) for image, block in enumerate(blocks)]
        return [(torch.as_tensor(query), torch.as_tensor(target)) for query, target in pairs]


def _corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")
