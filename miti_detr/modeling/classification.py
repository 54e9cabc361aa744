"""How a query tells its class: one softmax with "no object", or a sigmoid for each class.

Each of the two knows the columns of the logits, the cost of a match, the loss, and how detections
are read. L decoder layers, N images, Q queries, K classes, T objects of an image, D detections.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss


class ClassScores(NamedTuple):
    """What is read from the logits of one decoder layer.

    Attributes:
        scores: (N, D) in [0, 1].
        classes: (N, D) int64 in 0..K-1.
        queries: (N, D) int64, the query of each detection.
    """

    scores: Tensor
    classes: Tensor
    queries: Tensor


class ClassLoss(nn.Module):
    """Base of the two kinds.

    Attributes:
        name: value of ``MODEL.DETR.CLASS_LOSS``.
        num_columns: of the logits.
    """

    name: str
    num_columns: int

    def make_head(self, d_model: int) -> nn.Linear:
        """Make the class head for decoder states of width C = ``d_model``."""
        return nn.Linear(d_model, self.num_columns)

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cost of giving objects to queries.

        Args:
            logits: (L, N, Q, columns).
            labels: (L, N, Q, T) int64, classes of the objects.

        Returns:
            (L, N, Q, T).
        """
        raise NotImplementedError

    def normalizer(self, classes: Tensor, num_boxes: Tensor) -> Tensor:
        """What the sum over a process' queries is divided by, before the mean over processes.

        Args:
            classes: (N, Q) int64, K for queries without an object.
            num_boxes: scalar, objects in the batch.
        """
        raise NotImplementedError

    def forward(self, logits: Tensor, classes: Tensor, normalizer: Tensor) -> Tensor:
        """Loss of each decoder layer, (L,).

        Args:
            logits: (L, N, Q, columns).
            classes: (L, N, Q) int64, K for queries without an object.
            normalizer: scalar, of :meth:`normalizer`.
        """
        raise NotImplementedError

    def read(self, logits: Tensor) -> ClassScores:
        """Read detections from the logits (N, Q, columns) of one decoder layer."""
        raise NotImplementedError


class SoftmaxLoss(ClassLoss):
    """Weighted cross-entropy over K classes and "no object", which is column K.

    loss = sum_i w[c_i] * (- log softmax(logits_i)[c_i]) / sum_i w[c_i]

    Source: DETR, section 3.1; facebookresearch/detr ``models/detr.py`` at 29901c5.
    """

    name = "softmax"
    empty_weight: Tensor

    def __init__(self, num_classes: int, *, no_object_weight: float = 0.1) -> None:
        """Make the loss of K classes; w is ``no_object_weight`` for "no object", otherwise 1."""
        super().__init__()
        self.num_columns = num_classes + 1
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight, persistent=False)

    @staticmethod
    def cost(logits: Tensor, labels: Tensor) -> Tensor:
        """Minus the probability of the class."""
        return -logits.softmax(-1).gather(-1, labels)

    def normalizer(self, classes: Tensor, num_boxes: Tensor) -> Tensor:
        """Sum of the class weights, which is the same for every decoder layer."""
        return self.empty_weight.to(num_boxes.dtype)[classes].sum()

    def forward(self, logits: Tensor, classes: Tensor, normalizer: Tensor) -> Tensor:
        """Weighted cross-entropy of each decoder layer."""
        loss = F.cross_entropy(
            logits.flatten(0, 2),
            classes.flatten(),
            weight=self.empty_weight.to(logits.dtype),
            reduction="none",
        )
        return loss.view(len(logits), -1).sum(1) / normalizer

    @staticmethod
    def read(logits: Tensor) -> ClassScores:
        """One detection of each query, in their order: its best class other than "no object"."""
        scores, classes = logits.float().softmax(-1)[..., :-1].max(-1)
        queries = torch.arange(logits.shape[1], device=logits.device).expand_as(classes)
        return ClassScores(scores, classes, queries)


class FocalLoss(ClassLoss):
    """Sigmoid focal loss: each class by itself, and no column for "no object".

    loss = sum over queries and classes of - a_t (1 - p_t)^gamma log p_t / number of objects

    ``alpha`` weighs the class of a query, 1 - ``alpha`` all its other classes; ``gamma`` 0 is the
    cross-entropy. A query may be several of the at most ``max_detections`` detections of an image.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017; fundamentalvision/
    Deformable-DETR ``models/deformable_detr.py`` and ``models/matcher.py`` at 11169a6.
    """

    name = "focal"

    def __init__(
        self,
        num_classes: int,
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
        max_detections: int = 100,
    ) -> None:
        """Make the loss of K classes."""
        super().__init__()
        self.num_columns = num_classes
        self.alpha = alpha
        self.gamma = gamma
        self.max_detections = max_detections

    def make_head(self, d_model: int) -> nn.Linear:
        """Begin with a score of 0.01 for every class, most of which are absent."""
        head = super().make_head(d_model)
        nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
        return head

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of the class if it is the query's, minus the loss if it is not."""
        p = logits.sigmoid().gather(-1, labels)
        eps = 1e-8
        present = self.alpha * (1 - p) ** self.gamma * -(p + eps).log()
        absent = (1 - self.alpha) * p**self.gamma * -(1 - p + eps).log()
        return present - absent

    def normalizer(self, classes: Tensor, num_boxes: Tensor) -> Tensor:
        """Number of objects."""
        return num_boxes

    def forward(self, logits: Tensor, classes: Tensor, normalizer: Tensor) -> Tensor:
        """Focal loss of each decoder layer."""
        truth = F.one_hot(classes, self.num_columns + 1)[..., :-1].to(logits.dtype)
        loss = sigmoid_focal_loss(logits, truth, alpha=self.alpha, gamma=self.gamma)
        return loss.sum((1, 2, 3)) / normalizer.clamp(min=1)

    def read(self, logits: Tensor) -> ClassScores:
        """The pairs of a query and a class with the highest scores, in decreasing order."""
        scores = logits.float().sigmoid().flatten(1)
        scores, index = scores.topk(min(self.max_detections, scores.shape[1]))
        return ClassScores(scores, index % self.num_columns, index // self.num_columns)


def build_class_loss(cfg: CfgNode) -> ClassLoss:
    """Make what ``MODEL.DETR.CLASS_LOSS`` names."""
    detr = cfg.MODEL.DETR
    if detr.CLASS_LOSS == "softmax":
        return SoftmaxLoss(detr.NUM_CLASSES, no_object_weight=detr.NO_OBJECT_WEIGHT)
    return FocalLoss(
        detr.NUM_CLASSES,
        alpha=detr.FOCAL_ALPHA,
        gamma=detr.FOCAL_GAMMA,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
