"""The set loss of DETR.

L decoder layers, N images, Q queries, K classes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from miti_detr.layers import at_least_float32
from miti_detr.scalars import is_logging, log_scalars

from .classification import ClassLoss, SoftmaxLoss, build_class_loss
from .losses import BoxLoss, cardinality_errors, class_error
from .matcher import HungarianMatcher
from .targets import Target


class Matches(NamedTuple):
    """Pairs of a prediction and an object: M matches in each of L decoder layers.

    Attributes:
        layer: (L M) of the L layers that have losses.
        image: (L M).
        query: (L M).
        target: (L M) the object, counted over all images of the batch.
        num_layers: L; the first M entries are of its first layer, and so on.
        num_boxes: scalar, the normaliser of losses of matches.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor
    num_layers: int
    num_boxes: Tensor


class Normalizers(NamedTuple):
    """What the losses of a batch are divided by.

    Attributes:
        num_boxes: scalar, objects of the batch; at least 1 is taken.
        class_weight: scalar, sum of the class weights of all queries.
    """

    num_boxes: Tensor
    class_weight: Tensor

    def of(self, loss: str) -> Tensor:
        """Return the normaliser of a loss, given its name."""
        return self.class_weight if loss.startswith("loss_ce") else self.num_boxes.clamp(min=1)


class SetCriterion(nn.Module):
    """Matches each decoder layer's predictions with the objects, then sums the losses of the pairs.

    Returned losses are weighted: their sum is what is optimised. Diagnostics go to Detectron2's
    event storage, if one is open, as ``diag/class_error`` and ``diag/cardinality_error``.

    In training with several processes both normalisers are means over the processes, so that the
    loss does not depend on how a batch is divided. (The published code averages only the number of
    objects and normalises the classification loss by each process' own batch; with one process they
    agree.)

    Attributes:
        whole_batch: objects of each image in this process, while batches are parts of a larger one:
            with its normalisers, the losses of the parts together are those of the larger batch.

    Source: DETR, sections 3.1 and A.2; facebookresearch/detr ``models/detr.py`` at 29901c5.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        matcher: HungarianMatcher,
        class_weight: float = 1.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        no_object_weight: float = 0.1,
        deep_supervision: bool = True,
        class_loss: ClassLoss | None = None,
    ) -> None:
        """Make the criterion.

        Args:
            num_classes: K.
            matcher: pairs predictions and objects.
            class_weight: weight of the classification loss.
            l1_weight: weight of the L1 loss of the boxes.
            giou_weight: weight of the generalised IoU loss.
            no_object_weight: class weight of "no object" in the cross-entropy.
            deep_supervision: take the losses of every decoder layer, not only of the last one.
            class_loss: None: :class:`SoftmaxLoss` with ``no_object_weight``.
        """
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.deep_supervision = deep_supervision
        self.class_loss = class_loss or SoftmaxLoss(num_classes, no_object_weight=no_object_weight)
        self.box_loss = BoxLoss()
        self.whole_batch: Sequence[int] | None = None

    @property
    def empty_weight(self) -> Tensor:
        """Class weights (K+1,) of the softmax loss."""
        return self.class_loss.get_buffer("empty_weight")

    def normalizers(
        self, counts: Tensor, num_queries: int, dtype: torch.dtype = torch.float32
    ) -> Normalizers:
        """Compute what the losses of a batch are divided by.

        An image has as many matched queries as objects, if it has enough queries.

        Args:
            counts: (N,) objects of each image.
            num_queries: Q.
            dtype: of both normalisers.
        """
        num_boxes = counts.sum().to(dtype)
        matched = torch.arange(num_queries, device=counts.device) < counts[:, None]
        classes = torch.where(matched, 0, self.num_classes)  # all classes have the same weight
        return Normalizers(num_boxes, self.class_loss.normalizer(classes, num_boxes))

    def forward(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        extra_losses: Callable[[Matches], dict[str, Tensor]] | None = None,
        *,
        suffix: str = "",
    ) -> dict[str, Tensor]:
        """Compute the weighted losses.

        They are computed in float32 or better, also under autocast.

        Args:
            logits: (L, N, Q, columns of the class loss), decoder layers in order.
            boxes: (L, N, Q, 4) ``cxcywh``, relative to the un-padded image.
            targets: the objects of the N images.
            extra_losses: computes more weighted losses from the matches, each (L,), or (1,) where
                only the last layer has one.
            suffix: appended to all names.

        Returns:
            ``loss_ce``, ``loss_bbox``, ``loss_giou`` and the extra ones of the last decoder layer,
            and with deep supervision the same with suffix ``_0``, ``_1``, ... of the earlier
            layers.
        """
        if not self.deep_supervision:
            logits, boxes = logits[-1:], boxes[-1:]
        with torch.autocast(logits.device.type, enabled=False):
            logits, boxes = at_least_float32(logits), at_least_float32(boxes)
            losses = self._losses(logits, boxes, targets, extra_losses, suffix)
        # The backward pass of unbind is one stack; that of indexing is an addition for each layer.
        by_layer = {name: values.unbind() for name, values in losses.items()}
        return {
            name + of_layer + suffix: values[index]
            for index, of_layer in enumerate(_suffixes(len(logits)), start=-len(logits))
            for name, values in by_layer.items()
            if -index <= len(values)
        }

    def _losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        targets: Sequence[Target],
        extra_losses: Callable[[Matches], dict[str, Tensor]] | None,
        suffix: str,
    ) -> dict[str, Tensor]:
        """Weighted losses by name, each (L,) or (1,)."""
        matches = self.matcher.match_layers(logits, boxes, targets)
        layer, image, query, target = matches.to(logits.device, non_blocking=True)
        counts = _on(logits.device, [len(t["labels"]) for t in targets])
        target = target + (counts.cumsum(0) - counts)[image]  # counted over the whole batch
        labels = torch.cat([t["labels"] for t in targets])[target]
        truth = torch.cat([t["boxes"] for t in targets]).to(boxes)[target]

        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        classes[layer, image, query] = labels
        normalizers = self._shared_normalizers(counts, logits)
        ce = self.class_loss(logits, classes, normalizers.of("loss_ce"))
        num_boxes = normalizers.of("loss_bbox")
        predicted = boxes[layer, image, query].view(len(logits), -1, 4)
        l1, giou = self.box_loss(predicted, truth.view_as(predicted), num_boxes)
        if is_logging():
            last = slice(len(query) - predicted.shape[1], None)  # the last layer's matches
            error = class_error(logits[-1, image[last], query[last]], labels[last])
            names = [f"diag/cardinality_error{each}{suffix}" for each in _suffixes(len(logits))]
            errors = dict(zip(names, cardinality_errors(logits, counts).unbind(), strict=True))
            log_scalars({"diag/class_error" + suffix: error, **errors})
        losses = {
            "loss_ce": self.class_weight * ce,
            "loss_bbox": self.l1_weight * l1,
            "loss_giou": self.giou_weight * giou,
        }
        if extra_losses is not None:
            losses |= extra_losses(Matches(layer, image, query, target, len(logits), num_boxes))
        return losses

    def _shared_normalizers(self, counts: Tensor, logits: Tensor) -> Normalizers:
        """Normalisers of the whole batch, in training means over the processes."""
        if self.whole_batch is not None:
            counts = _on(counts.device, self.whole_batch)
        found = self.normalizers(counts, logits.shape[2], logits.dtype)
        return Normalizers(*_mean_over_processes(*found)) if self.training else found


def build_criterion(cfg: CfgNode) -> SetCriterion:
    """Make the criterion, with its matcher, that ``cfg.MODEL.DETR`` describes."""
    detr = cfg.MODEL.DETR
    weights = {
        "class_weight": detr.CLASS_WEIGHT,
        "l1_weight": detr.L1_WEIGHT,
        "giou_weight": detr.GIOU_WEIGHT,
    }
    class_loss = build_class_loss(cfg)
    return SetCriterion(
        num_classes=detr.NUM_CLASSES,
        matcher=HungarianMatcher(**weights, class_cost=class_loss.cost),
        **weights,
        deep_supervision=detr.DEEP_SUPERVISION,
        class_loss=class_loss,
    )


def _suffixes(num_layers: int) -> list[str]:
    """Suffixes of the loss names: the last layer has none."""
    return [f"_{index}" for index in range(num_layers - 1)] + [""]


def _on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """Copy integers to a device without waiting for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def _mean_over_processes(*values: Tensor) -> tuple[Tensor, ...]:
    world_size = comm.get_world_size()
    if world_size == 1:
        return values
    total = torch.stack(values)
    torch.distributed.all_reduce(total)
    return (total / world_size).unbind()
