"""The detector as a function of tensors, which every exporter can record.

N images, H x W padded batch in pixels, D detections, h' x w' grid of mask logits.
"""

import copy

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from miti_detr.modeling import MitiDetr
from miti_detr.modeling.classification import ClassScores
from miti_detr.modeling.postprocess import boxes_in_pixels
from miti_detr.modeling.pretrain import UpDetr
from miti_detr.modeling.segmentation import MaskPrediction, SegmentationDetr

CHUNK = 16  # detections of an image whose masks are computed at once, which bounds the memory
_FLOAT32 = ("position_encoding", "criterion")  # parts that compute in float32 in any precision


class TensorDetector(nn.Module):
    """A model of images and their sizes, without Detectron2's structures.

    Normalisation, padding mask and boxes in pixels are inside. It can be traced by
    ``torch.jit.trace`` and recorded by ``torch.export`` with N, H and W as variables. Of a panoptic
    model it returns objects: detections of stuff have the score 0.
    """

    is_stuff: Tensor | None

    def __init__(
        self,
        model: MitiDetr,
        *,
        half: bool = False,
        masks: bool = False,
        top_k: int | None = None,
    ) -> None:
        """Take a model.

        Args:
            model: in evaluation mode; it is not changed.
            half: compute in float16; only pixels, position encoding, scores and boxes do not.
            masks: return masks as well.
            top_k: the best detections of each image that are returned; None: all.

        Raises:
            ValueError: the model is not a detector, or has no masks.
        """
        super().__init__()
        if not isinstance(model, MitiDetr) or isinstance(model, UpDetr):
            raise ValueError(
                f"{type(model).__name__} is not a detector that can be exported. Export a model "
                "whose MODEL.META_ARCHITECTURE is a detector of this package."
            )
        if masks and not isinstance(model, SegmentationDetr):
            raise ValueError("the model has no masks: its MODEL.MASK_ON is False.")
        if half:
            model = copy.deepcopy(model)
            for name, part in model.named_children():
                if name not in _FLOAT32:
                    part.half()
        backbone = _with_fixed_padding(model.backbone)
        if backbone is not model.backbone:
            model = copy.copy(model)  # of the modules, only the backbone is another one
            model._modules = {**model._modules, "backbone": backbone}
        self.model = model
        constraints = model.backbone.padding_constraints()
        self.divisor, self.square = constraints["size_divisibility"], constraints["square_size"]
        self.dtype = torch.float16 if half else torch.float32
        self.masks, self.top_k = masks, top_k
        is_stuff = None
        if isinstance(model, SegmentationDetr) and model.stuff_classes:
            is_stuff = torch.zeros(model.num_classes, dtype=torch.bool, device=model.device)
            is_stuff[sorted(model.stuff_classes)] = True
        self.register_buffer("is_stuff", is_stuff, persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect.

        Args:
            images: (N, 3, H, W) in 0..255, uint8 or float, in the channel order of the model; each
                image is in the upper left corner.
            sizes: (N, 2) int64, height and width of each image in pixels. What is outside of it
                may hold any values.

        Returns:
            ``boxes`` (N, D, 4) float32 xyxy in pixels, clipped to the image; ``scores`` (N, D)
            float32; ``labels`` (N, D) int64, contiguous. All queries, or the ``top_k`` best in
            descending order of their scores; no threshold. With masks also ``masks`` (N, D, h', w')
            float32: logits on a grid that covers the batch with the padding of the backbone.
        """
        model = self.model
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=sizes.device)[None] < sizes[:, :1]
        columns = torch.arange(width, device=sizes.device)[None] < sizes[:, 1:]
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        pixels = (images.float() - model.pixel_mean) / model.pixel_std
        batch = self._pad(torch.where(inside, pixels, 0.0)).to(self.dtype)
        prediction = model.predict_set(ImageList(batch, sizes), [], all_layers=False)
        scores, labels, queries = self._read_classes(prediction.logits[-1])
        boxes = boxes_in_pixels(prediction.boxes[-1], queries, sizes)
        limit = sizes[:, None, [1, 0, 1, 0]].to(boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        if not self.masks:
            return boxes, scores, labels
        assert isinstance(prediction, MaskPrediction)
        parts = [self._masks(prediction, part) for part in queries.split(CHUNK, dim=1)]
        return boxes, scores, labels, torch.cat(parts, dim=1)

    def _read_classes(self, logits: Tensor) -> ClassScores:
        """Those of the model, and of these the best."""
        found = self.model.read_classes(logits)
        if self.is_stuff is not None:
            found = found._replace(scores=found.scores.masked_fill(self.is_stuff[found.classes], 0))
        if self.top_k is None:
            return found
        best = found.scores.topk(min(self.top_k, found.scores.shape[1])).indices
        return ClassScores(*(field.gather(1, best) for field in found))

    def _masks(self, prediction: MaskPrediction, queries: Tensor) -> Tensor:
        """Mask logits (N, D, h', w') of queries (N, D)."""
        model = self.model
        assert isinstance(model, SegmentationDetr)
        image = torch.arange(queries.shape[0], device=queries.device)[:, None].expand_as(queries)
        logits = model.mask_logits(prediction, image.flatten(), queries.flatten())
        return logits.float().unflatten(0, queries.shape)

    def _pad(self, batch: Tensor) -> Tensor:
        """Pad at the right and bottom as the backbone needs it."""
        height, width = batch.shape[-2:]
        if self.square > 0:
            return F.pad(batch, (0, self.square - width, 0, self.square - height))
        if self.divisor > 1:
            # As multiples: while a size is recorded as a variable, those below follow from it.
            columns = (width + self.divisor - 1) // self.divisor * self.divisor
            rows = (height + self.divisor - 1) // self.divisor * self.divisor
            return F.pad(batch, (0, columns - width, 0, rows - height))
        return batch


def _with_fixed_padding(backbone: nn.Module) -> nn.Module:
    """Return a backbone whose convolutions do not compute their padding from the size.

    timm's ``Conv2dSame`` pads as TensorFlow does: k - s pixels in all if the stride s divides the
    size, of which the left side has the smaller half. Here it always does, because a batch is
    padded to a multiple of all strides together. As functions of a variable size, the paddings of
    one layer after the other become too long to be recorded.
    """
    if not any(type(m).__name__ == "Conv2dSame" for m in backbone.modules()):
        return backbone
    backbone = copy.deepcopy(backbone)
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and type(child).__name__ == "Conv2dSame":
                plain = nn.Conv2d(
                    child.in_channels,
                    child.out_channels,
                    _pair(child.kernel_size),
                    _pair(child.stride),
                    dilation=_pair(child.dilation),
                    groups=child.groups,
                    bias=child.bias is not None,
                )
                plain.weight, plain.bias = child.weight, child.bias
                setattr(parent, name, nn.Sequential(nn.ZeroPad2d(_same_padding(child)), plain))
    return backbone


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _same_padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """Left, right, top and bottom."""
    sides: list[int] = []
    for size, stride, dilation in zip(
        conv.kernel_size[::-1], conv.stride[::-1], conv.dilation[::-1], strict=True
    ):
        total = max((size - 1) * dilation + 1 - stride, 0)
        sides += [total // 2, total - total // 2]
    left, right, top, bottom = sides
    return left, right, top, bottom
