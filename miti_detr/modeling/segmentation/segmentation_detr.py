"""DETR and Miti-DETR with masks: instance and panoptic segmentation.

N images, H x W padded batch in pixels, Q queries, K classes, M pairs of an image and a query, C
width, h' x w' grid of the mask logits.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import ImageList, Instances
from torch import Tensor

from miti_detr.layers import at_least_float32
from miti_detr.modeling.criterion import Matches
from miti_detr.modeling.detr import MitiDetr
from miti_detr.modeling.stages import Decoded, Encoded, SetPrediction

from .losses import at_pixels, at_points, mask_losses
from .mask_head import AttentionMap, MaskHead
from .panoptic import confident_queries, merge_panoptic
from .postprocess import RunLengthMasks, Size, resize_logits
from .prediction import Grid, MaskPrediction, with_pyramid
from .targets import padded_masks

MASK_PARTS = ("bbox_attention", "mask_head")
_CHUNK = 16  # queries whose masks are computed at once in inference


class SegmentationDetr(MitiDetr):
    """A :class:`MitiDetr` whose queries have masks; ``MODEL.MASK_ON True`` makes one.

    Masks cost much more than boxes, so they are computed for the matched queries in training and
    for the detections in inference. Losses and detections are those that the masks of all queries
    would give.

    State-dict keys are those of :class:`MitiDetr` with ``bbox_attention`` and ``mask_head``, as
    published.
    """

    predicts_masks = True

    @configurable
    def __init__(
        self,
        *,
        mask_points: int = 0,
        mask_weight: float = 1.0,
        dice_weight: float = 1.0,
        frozen_weights: str = "",
        mask_format: str = "bool",
        min_score: float = 0.0,
        stuff_classes: Sequence[int] = (),
        panoptic_threshold: float = 0.85,
        **detr: Any,
    ) -> None:
        """Build a model from its parts.

        Args:
            mask_points: points of a mask at which the losses are taken; 0: at all pixels.
            mask_weight: weight of the focal loss of the masks.
            dice_weight: weight of their dice loss.
            frozen_weights: file of the weights of the detector, which are then not trained; "":
                everything is trained. :func:`miti_detr.checkpoint.load_frozen` reads it.
            mask_format: of ``pred_masks``, ``bool`` or ``rle``.
            min_score: detections with a lower score are left out, and their masks not computed.
            stuff_classes: classes without instances; if there are any, inference returns a panoptic
                segmentation as well.
            panoptic_threshold: lowest probability of the class of a panoptic segment.
            detr: arguments of :class:`MitiDetr`; the backbone has features beside the encoded one.
        """
        super().__init__(**detr)
        *finer, _ = self.backbone.in_features
        self.pyramid = tuple(reversed(finer))
        width, nheads = self.transformer.d_model, self.transformer.nhead
        self.bbox_attention = AttentionMap(width, nheads)
        channels = [self.backbone.channels[name] for name in self.pyramid]
        self.mask_head = MaskHead(width, nheads, channels)
        self.mask_points = mask_points
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.mask_format = mask_format
        self.min_score = min_score
        self.stuff_classes = frozenset(stuff_classes)
        self.panoptic_threshold = panoptic_threshold
        self.frozen_weights = frozen_weights
        if frozen_weights:
            for name, child in self.named_children():
                child.requires_grad_(name in MASK_PARTS)
            self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Build the parts that ``cfg`` names.

        Raises:
            ValueError: for values that are not supported.
        """
        parts = super().from_config(cfg)
        detr, test = cfg.MODEL.DETR, cfg.TEST
        return {
            **parts,
            "backbone": with_pyramid(parts["backbone"], encodes_all="levels" in parts),
            "mask_points": detr.MASK_POINTS,
            "frozen_weights": detr.FROZEN_WEIGHTS,
            "mask_format": test.MASK_FORMAT,
            "min_score": test.MASK_MIN_SCORE,
            "stuff_classes": detr.STUFF_CLASSES,
            "panoptic_threshold": test.PANOPTIC_THRESHOLD,
        }

    @property
    def variant(self) -> dict[str, Any]:
        """As in the base class, with the features and the stuff classes that the masks use."""
        return {
            **super().variant,
            "mask_features": list(self.pyramid),
            "stuff_classes": sorted(self.stuff_classes),
        }

    def train(self, mode: bool = True) -> "SegmentationDetr":
        """Set the mode; a frozen detector stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.frozen_weights:
            for name, child in self.named_children():
                child.train(mode and name in MASK_PARTS)
        return self

    def predict(self, batched_inputs: list[dict[str, Any]]) -> MaskPrediction:
        """Compute the raw output for the inputs of :meth:`forward`, with the masks of all queries.

        Returns:
            As in the base class, with ``masks`` (N, Q, h', w'): logits of the last decoder layer on
            the grid of the finest feature, which covers the padded batch.
        """
        prediction = super().predict(batched_inputs)
        assert isinstance(prediction, MaskPrediction)
        count, queries = prediction.states.shape[:2]
        image = torch.arange(count, device=self.device).repeat_interleave(queries)
        query = torch.arange(queries, device=self.device).repeat(count)
        with self.execution.precision(self):
            masks = self.mask_logits(prediction, image, query)
        return dataclasses.replace(prediction, masks=masks.unflatten(0, (count, queries)))

    def predict_set(
        self, images: ImageList, batched_inputs: list[dict[str, Any]], *, all_layers: bool = True
    ) -> MaskPrediction:
        """Run the network except the mask head; arguments as in the base class."""
        prediction = super().predict_set(images, batched_inputs, all_layers=all_layers)
        assert isinstance(prediction, MaskPrediction)
        height, width = images.tensor.shape[-2:]
        return dataclasses.replace(prediction, padded=(height, width))

    def apply_heads(self, encoded: Encoded, decoded: Decoded) -> MaskPrediction:
        """Compute logits and boxes, and keep what masks are computed from."""
        found = super().apply_heads(encoded, decoded)
        return MaskPrediction(
            found.logits,
            found.boxes,
            decoded.states[-1],
            self.grid(encoded, decoded),
            tuple(encoded.features[name].tensor for name in self.pyramid),
            proposals=getattr(found, "proposals", None),
        )

    def grid(self, encoded: Encoded, decoded: Decoded) -> Grid:
        """Return the feature whose cells queries look at."""
        return Grid(encoded.source, decoded.memory, encoded.mask)

    def mask_logits(self, prediction: MaskPrediction, image: Tensor, query: Tensor) -> Tensor:
        """Compute the masks of pairs of an image and a query.

        Args:
            prediction: of :meth:`predict_set`.
            image: (M,) int64.
            query: (M,) int64.

        Returns:
            (M, h', w').
        """
        source, memory, mask = prediction.grid
        # Of all queries: beside the mask head, they cost nothing.
        maps = self.bbox_attention(prediction.states, memory, mask)
        logits: Tensor = self.mask_head(source, maps[image, query], prediction.pyramid, image)
        return logits

    def losses(
        self, prediction: SetPrediction, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Weighted losses: those of the base class, ``loss_mask`` (focal) and ``loss_dice``.

        The masks of the last decoder layer only have losses.

        Args:
            prediction: of :meth:`predict_set`.
            batched_inputs: with ``instances`` that have ``gt_masks``.

        Raises:
            ValueError: as in the base class, or if there are no masks or of another size.
        """
        assert isinstance(prediction, MaskPrediction)
        targets = self.targets(batched_inputs, prediction.boxes.dtype)
        truth = padded_masks(
            [x["instances"] for x in batched_inputs], prediction.padded, self.device
        )
        kind = self.device.type
        precision = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def of_masks(matches: Matches) -> dict[str, Tensor]:
            """The losses of the last layer's matches, one value each."""
            last = slice(len(matches.query) - len(matches.query) // matches.num_layers, None)
            with torch.autocast(kind, *precision):  # which the criterion disables
                logits = self.mask_logits(prediction, matches.image[last], matches.query[last])
            pair = at_least_float32(logits), truth[matches.target[last]]
            pair = at_points(*pair, self.mask_points) if self.mask_points else at_pixels(*pair)
            focal, dice = mask_losses(*pair, matches.num_boxes)
            return {
                "loss_mask": self.mask_weight * focal[None],
                "loss_dice": self.dice_weight * dice[None],
            }

        return self.criterion(prediction.logits, prediction.boxes, targets, of_masks)

    def inference(
        self,
        prediction: SetPrediction,
        batched_inputs: list[dict[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Any]]:
        """Detections with masks, and with stuff classes a panoptic segmentation.

        Returns:
            As in the base class; the instances have ``pred_masks`` in the output frame: (M, height,
            width) bool, or :class:`RunLengthMasks`. With stuff classes, these are not
            among the instances, and there is ``panoptic_seg``: see :func:`merge_panoptic`.
        """
        assert isinstance(prediction, MaskPrediction)
        outputs = super().inference(prediction, batched_inputs, image_sizes)
        for index, (output, size) in enumerate(zip(outputs, image_sizes, strict=True)):
            instances = output["instances"]
            part, image = prediction.of_image(index), (int(size[0]), int(size[1]))
            queries = instances.get("pred_queries")
            instances.remove("pred_queries")
            frame = instances.image_size
            masks = (x > 0 for x in self._resized_logits(part, queries, image, frame))
            instances.pred_masks = (
                RunLengthMasks.cat([RunLengthMasks.encode(x) for x in masks])
                if self.mask_format == "rle"
                else torch.cat([queries.new_zeros(0, *frame, dtype=torch.bool), *masks])
            )
            if self.stuff_classes:
                output["panoptic_seg"] = self._panoptic(part, image, frame)
        return outputs

    def read_detections(
        self, prediction: SetPrediction, image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Detections with at least the lowest score, and ``pred_queries``; no stuff."""
        results = []
        queries = self.read_classes(prediction.logits[-1]).queries
        found = super().read_detections(prediction, image_sizes)
        for result, of_image in zip(found, queries, strict=True):
            result.pred_queries = of_image
            keep = result.scores >= self.min_score
            for stuff in self.stuff_classes:
                keep &= result.pred_classes != stuff
            results.append(result[keep] if not keep.all() else result)
        return results

    def _resized_logits(
        self, prediction: MaskPrediction, queries: Tensor, image: Size, output: Size
    ) -> Iterator[Tensor]:
        """Mask logits of queries of a single image in its output frame, a few at a time."""
        for chunk in queries.split(_CHUNK) if len(queries) else ():
            with self.execution.precision(self):
                logits = self.mask_logits(prediction, torch.zeros_like(chunk), chunk)
            logits = at_least_float32(logits)
            yield resize_logits(logits, padded=prediction.padded, image=image, output=output)

    def _panoptic(self, prediction: MaskPrediction, image: Size, output: Size) -> Any:
        logits = prediction.logits[-1, 0].float()
        if logits.shape[-1] > self.num_classes:
            queries, classes = confident_queries(logits, self.panoptic_threshold)
        else:  # focal loss, without a column of "no object"
            scores, classes = logits.sigmoid().max(-1)
            queries = (scores > self.panoptic_threshold).nonzero()[:, 0]
            classes = classes[queries]
        chunks = list(self._resized_logits(prediction, queries, image, image))
        masks = torch.cat(chunks) if chunks else logits.new_zeros(0, *image)
        return merge_panoptic(classes, masks, stuff=self.stuff_classes, output=output)


MitiDetr.with_masks = SegmentationDetr
