"""Pictures of the patches of UP-DETR's pre-training, and where a model finds them."""

from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances, pairwise_iou
from PIL import Image, ImageOps

from miti_detr.data import PatchDatasetMapper
from miti_detr.engine.predictor import Predictor
from miti_detr.files import replacing

from .detections import CELL, choose_images, compose_pairs
from .drawing import class_colour, draw_boxes, resize_for_reading, to_picture

THUMBNAIL = 40  # largest side of a patch shown below its image, pixels


def best_boxes(instances: Instances, num_patches: int) -> torch.Tensor:
    """Return the box with the highest score among the detections for each patch.

    Args:
        instances: output of :class:`~miti_detr.modeling.pretrain.UpDetr`.
        num_patches: number of patches M.

    Returns:
        (M, 4) boxes, xyxy in the frame of ``instances``; zeros for a patch without a detection.
    """
    boxes = torch.zeros(num_patches, 4)
    for index in instances.scores.argsort().tolist():  # the highest score is written last
        boxes[instances.pred_patches[index]] = instances.pred_boxes.tensor[index]
    return boxes


def draw_patches(cfg: CfgNode, dataset: str, path: Path, *, images: int = 8) -> None:
    """Write a PNG with images and their patches (left), and where each patch was found (right).

    A patch and its box share colour and number. The label of a found box is its IoU with the patch
    in percent.

    Args:
        cfg: config of an ``UpDetr``, with ``MODEL.WEIGHTS``.
        dataset: name in Detectron2's catalog.
        path: PNG file.
        images: number of images, spread evenly over the data set.

    Raises:
        ValueError: none of these images is large enough or readable.
        KeyError: the data set is not registered.
    """
    records = DatasetCatalog.get(dataset)
    mapper = PatchDatasetMapper(cfg, is_train=False)
    chosen = [mapper(records[index]) for index in choose_images(images, len(records))]
    items = [item for item in chosen if item is not None]
    if not items:
        raise ValueError(f"{dataset!r}: all chosen images are unreadable or too small")
    model = Predictor(cfg).model
    pairs = []
    for item in items:
        with torch.no_grad():
            instances = model([item])[0]["instances"].to("cpu")
        truth = item["patch_boxes"].float()
        found = best_boxes(instances, len(truth))
        overlaps = pairwise_iou(Boxes(truth), Boxes(found)).diagonal()
        array = np.ascontiguousarray(item["image"].numpy().transpose(1, 2, 0))
        image, _ = resize_for_reading(to_picture(array, cfg.INPUT.FORMAT), CELL, shrink=True)
        scale = np.array([image.width / item["width"], image.height / item["height"]] * 2)
        numbers = list(range(len(truth)))
        left = draw_boxes(image, truth.numpy() * scale, numbers, [str(i + 1) for i in numbers])
        labels = [f"{i + 1}: {100 * x:.0f}" for i, x in enumerate(overlaps.tolist())]
        right = draw_boxes(image, found.numpy() * scale, numbers, labels)
        patches = [
            to_picture(patch.permute(1, 2, 0).numpy(), cfg.INPUT.FORMAT)
            for patch in item["patches"]
        ]
        name = Path(item["file_name"]).name
        hits = int((overlaps >= 0.5).sum())
        caption = f"{name}: {hits} of {len(truth)} patches with IoU \u2265 0.5"
        pairs.append((_with_thumbnails(left, patches), right, caption))
    title = f"{dataset}: patches (left), where they are found and IoU in percent (right)"
    with replacing(path) as temporary:
        compose_pairs(pairs, title).save(temporary, format="PNG")


def _with_thumbnails(image: Image.Image, patches: list[Image.Image]) -> Image.Image:
    """Show patches in a row below an image, framed in their colours."""
    side = min(THUMBNAIL, CELL // len(patches))
    sheet = Image.new("RGB", (max(image.width, side * len(patches)), image.height + side), "white")
    sheet.paste(image, (0, 0))
    for index, patch in enumerate(patches):
        small = patch.resize((side - 6, side - 6), Image.Resampling.BICUBIC)
        framed = ImageOps.expand(small, border=2, fill=class_colour(index))
        sheet.paste(framed, (index * side, image.height + 2))
    return sheet
