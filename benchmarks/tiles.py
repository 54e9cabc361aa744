"""Recall of small objects in large images, with and without tiles: ``python -m benchmarks.tiles``.

Images of 4,000 x 3,000 pixels are rendered as those of the data set ``shapes`` are, with 400
objects of 36 to 85 pixels. An object is found if a detection of its class has an IoU of 0.5.
"""

import argparse
import time

import numpy as np
import torch
from tabulate import tabulate
from torchvision.ops import box_iou

from miti_detr import load_predictor
from miti_detr.data.shapes_render import _draw_background, _draw_colour, _draw_shape, rasterise
from miti_detr.engine import prepare_cpu

HEIGHT, WIDTH, OBJECTS = 3000, 4000, 400
SIZES = (144, 340)  # square root of the area, quarter pixels: COCO's medium, small in this image
GAP = 6  # pixels between objects


def render_scene(seed: int) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Render an image.

    Returns:
        (H, W, 3) uint8 RGB, boxes (T, 4) xyxy in pixels, classes (T,).
    """
    rng = np.random.RandomState(seed)
    image, colours, _ = _draw_background(rng, HEIGHT, WIDTH)
    boxes = np.empty((OBJECTS, 4))
    labels: list[int] = []
    while len(labels) < OBJECTS:
        shape = _draw_shape(rng, SIZES, HEIGHT, WIDTH)
        assert shape is not None
        low, high = shape.polygon.min(axis=0) / 4, shape.polygon.max(axis=0) / 4
        others = boxes[: len(labels)]
        if ((low < others[:, 2:] + GAP) & (others[:, :2] < high + GAP)).all(axis=1).any():
            continue
        window, mask = rasterise(shape)
        image[window][mask] = _draw_colour(rng, colours)
        boxes[len(labels)] = *low, *high
        labels.append(shape.label)
    noise = rng.randint(-10, 11, size=image.shape, dtype=np.int8)
    pixels = (image + noise).clip(0, 255).astype(np.uint8)
    return pixels, torch.from_numpy(boxes), torch.tensor(labels)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="output/shapes/miti_detr/model_final.pth")
    parser.add_argument("--tiles", type=int, nargs="+", default=[160, 320], metavar="PIXELS")
    parser.add_argument("--images", type=int, default=4)
    args = parser.parse_args()
    prepare_cpu()
    rows = []
    for tile in (None, *args.tiles):
        predictor = load_predictor(args.weights, tile=tile, batch_size=16)
        found, start = 0, time.perf_counter()
        for seed in range(args.images):
            image, boxes, labels = render_scene(seed)
            result = predictor(image, channels="RGB")
            same = labels[:, None] == torch.as_tensor(result.pred_classes)[None]
            overlap = box_iou(boxes, torch.as_tensor(result.boxes).double())
            found += int(((overlap >= 0.5) & same).any(dim=1).sum())
        seconds = (time.perf_counter() - start) / args.images
        recall = 100 * found / (OBJECTS * args.images)
        rows.append([tile or "none", f"{recall:.1f} %", f"{seconds:.1f}"])
    print(tabulate(rows, headers=["tile", "recall", "seconds per image"], tablefmt="github"))


if __name__ == "__main__":
    main()
