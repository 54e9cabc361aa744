"""The detector as a function of tensors, which every exporter can record.

N images, H x W padded batch in pixels, D detections.
"""

import copy

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from miti_detr.modeling import MitiDetr
from miti_detr.modeling.postprocess import read_boxes
from miti_detr.modeling.pretrain import UpDetr

_FLOAT32 = ("position_encoding", "criterion")  # parts that compute in float32 in any precision


class TensorDetector(nn.Module):
    """A model of images and their sizes, without Detectron2's structures.

    Normalisation, padding mask and boxes in pixels are inside. It can be traced by
    ``torch.jit.trace`` and recorded by ``torch.export`` with N, H and W as variables.
    """

    def __init__(self, model: MitiDetr, *, half: bool = False) -> None:
        """Take a model.

        Args:
            model: in evaluation mode; it is not changed.
            half: compute in float16; only pixels, position encoding, scores and boxes do not.

        Raises:
            ValueError: the model is not a detector.
        """
        super().__init__()
        if not isinstance(model, MitiDetr) or isinstance(model, UpDetr):
            raise ValueError(
                f"{type(model).__name__} is not a detector that can be exported. Export a model "
                "whose MODEL.META_ARCHITECTURE is a detector of this package."
            )
        if half:
            model = copy.deepcopy(model)
            for name, part in model.named_children():
                if name not in _FLOAT32:
                    part.half()
        self.model = model
        constraints = model.backbone.padding_constraints()
        self.divisor, self.square = constraints["size_divisibility"], constraints["square_size"]
        self.dtype = torch.float16 if half else torch.float32

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (N, 3, H, W) in 0..255, uint8 or float, in the channel order of the model; each
                image is in the upper left corner.
            sizes: (N, 2) int64, height and width of each image in pixels. What is outside of it
                may hold any values.

        Returns:
            ``boxes`` (N, D, 4) float32 xyxy in pixels, clipped to the image; ``scores`` (N, D)
            float32; ``labels`` (N, D) int64, contiguous. All queries, without a threshold.
        """
        model = self.model
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=sizes.device)[None] < sizes[:, :1]
        columns = torch.arange(width, device=sizes.device)[None] < sizes[:, 1:]
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        pixels = (images.float() - model.pixel_mean) / model.pixel_std
        batch = self._pad(torch.where(inside, pixels, 0.0)).to(self.dtype)
        prediction = model.predict_set(ImageList(batch, sizes), [], all_layers=False)
        last = prediction.logits[-1], prediction.boxes[-1]
        boxes, scores, labels = read_boxes(*last, sizes, model.read_classes)
        limit = sizes[:, None, [1, 0, 1, 0]].to(boxes.dtype)
        return torch.minimum(boxes.clamp(min=0), limit), scores, labels

    def _pad(self, batch: Tensor) -> Tensor:
        """Pad at the right and bottom as the backbone needs it."""
        height, width = batch.shape[-2:]
        if self.square > 0:
            return F.pad(batch, (0, self.square - width, 0, self.square - height))
        if self.divisor > 1:
            return F.pad(batch, (0, -width % self.divisor, 0, -height % self.divisor))
        return batch
