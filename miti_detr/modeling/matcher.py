"""Bipartite matching of predictions with the objects of an image.

L decoder layers, N images, Q queries, K classes, T_i objects of image i.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from miti_detr.layers import box_cxcywh_to_xyxy, generalized_box_iou

from .classification import SoftmaxLoss
from .targets import Target


class HungarianMatcher(nn.Module):
    """Assigns each object its own query, at the least total cost.

    cost(query, object) = class_weight * cost(class) + l1_weight * |b - b'|_1 - giou_weight *
    GIoU(b, b')

    The cost of the class is minus its softmax probability p (and not its logarithm), or that of
    another class loss. "No object" never enters the cost.
    Source: DETR, section 3.1; facebookresearch/detr ``models/matcher.py`` at 29901c5.
    """

    def __init__(
        self,
        *,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        class_cost: Callable[[Tensor, Tensor], Tensor] = SoftmaxLoss.cost,
    ) -> None:
        """Set the weights; ``class_cost`` is that of a class loss.

        Raises:
            ValueError: if all are 0, which would match at random.
        """
        super().__init__()
        if class_weight == l1_weight == giou_weight == 0:
            raise ValueError("class_weight, l1_weight and giou_weight of the matcher are all 0")
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.class_cost = class_cost

    def forward(
        self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]
    ) -> list[tuple[Tensor, Tensor]]:
        """Match the predictions of one decoder layer, (N, Q, columns) and (N, Q, 4).

        Returns:
            For each image the matched queries, ascending, and their objects: int64 on the CPU.
        """
        _, image, query, target = self.match_layers(logits[None], boxes[None], targets)
        counts = image.bincount(minlength=len(targets)).tolist()
        return list(zip(query.split(counts), target.split(counts), strict=True))

    @torch.no_grad()
    def match_layers(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Tensor:
        """Match the predictions of several decoder layers, each independently.

        Args:
            logits: (L, N, Q, columns), K+1 of softmax, K of focal loss.
            boxes: (L, N, Q, 4) ``cxcywh`` relative to the un-padded image.
            targets: N.

        Returns:
            (4, M) int64 on the CPU: layer, image, query and object (counted within its image) of
            the M matches, ordered by the first three: min(Q, T_i) for each image of each layer.
        """
        counts = [len(target["labels"]) for target in targets]
        if not sum(counts):
            return torch.zeros(4, 0, dtype=torch.int64)
        costs = self.costs(logits, boxes, targets).cpu().numpy()
        # A diverged model must reach the check for non-finite losses, which names the images.
        costs = np.nan_to_num(costs, nan=1e6, posinf=1e6, neginf=-1e6)
        pairs = [
            linear_sum_assignment(cost[:, :count])
            for layer_costs in costs
            for cost, count in zip(layer_costs, counts, strict=True)
        ]
        query, target = (np.concatenate(indices) for indices in zip(*pairs, strict=True))
        layer, image = np.indices(costs.shape[:2]).reshape(2, -1)
        lengths = [len(queries) for queries, _ in pairs]
        matches = np.stack([layer.repeat(lengths), image.repeat(lengths), query, target])
        return torch.from_numpy(matches)

    def costs(self, logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Tensor:
        """Costs (L, N, Q, max T_i) of all layers and images; columns >= T_i are undefined.

        Arguments as in :meth:`match_layers`.
        """
        labels = nn.utils.rnn.pad_sequence([t["labels"] for t in targets], batch_first=True)
        target_boxes = nn.utils.rnn.pad_sequence([t["boxes"] for t in targets], batch_first=True)
        index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
        class_cost = self.class_cost(logits, index)
        truth = target_boxes.to(boxes)
        if boxes.is_cuda:  # many times as fast as cdist there, and several times slower on a CPU
            l1 = (boxes[:, :, :, None] - truth[None, :, None]).abs().sum(-1)
        else:
            l1 = torch.cdist(boxes, truth.expand(len(boxes), -1, -1, -1), p=1)
        giou = generalized_box_iou(
            box_cxcywh_to_xyxy(boxes)[:, :, :, None], box_cxcywh_to_xyxy(truth)[None, :, None]
        )
        return self.l1_weight * l1 + self.class_weight * class_cost - self.giou_weight * giou
