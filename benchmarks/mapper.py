"""Images a second that one worker of a data loader reads and augments.

``python -m benchmarks.mapper``: with the recipe of ``configs/coco/miti_detr_R50_300ep.yaml``, of
JPEG files of 640 x 480 and of 4000 x 3000 pixels. The peer does the same with Detectron2's
``ResizeShortestEdge`` (Pillow) and decodes at full size. Both are measured in turn, on one thread.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image
from tabulate import tabulate

from miti_detr import add_miti_detr_config
from miti_detr.data import DetrDatasetMapper, mapper

ROOT = Path(__file__).parents[1]
SIZES = {(640, 480): 40, (4000, 3000): 8}  # pixels: number of images
OBJECTS = 7  # of an image, as in COCO


def write_images(folder: Path, size: tuple[int, int], number: int) -> list[dict[str, Any]]:
    """Write JPEG files with detail at several scales; return their records."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(number):
        pixels = np.zeros((size[1], size[0], 3), np.float32)
        for cells in (8, 40, 200):
            noise = rng.integers(0, 80, (cells * 3 // 4, cells, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
        path = folder / f"{size[0]}_{index}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        boxes = [[10.0 * k, 20.0, 60.0, 70.0] for k in range(OBJECTS)]
        box = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        record = {"file_name": str(path), "width": size[0], "height": size[1], "image_id": index}
        records.append({**record, "annotations": [{"bbox": each, **box} for each in boxes]})
    return records


def mappers() -> dict[str, DetrDatasetMapper]:
    """Ours and the peer's."""
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/coco/miti_detr_R50_300ep.yaml"))
    ours = DetrDatasetMapper(cfg, is_train=True)
    with mock.patch.object(mapper, "FastResizeShortestEdge", T.ResizeShortestEdge):
        peer = DetrDatasetMapper(cfg, is_train=True)
    peer.least_side = None
    return {"ours": ours, "Pillow": peer}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size, number in SIZES.items():
            records = write_images(Path(folder), size, number)
            best = dict.fromkeys(made := mappers(), float("inf"))
            for _ in range(rounds):
                for name, each in made.items():
                    np.random.seed(0)
                    start = time.perf_counter()
                    for record in records:
                        each(record)
                    best[name] = min(best[name], time.perf_counter() - start)
            speeds = [number / seconds for seconds in best.values()]
            rows.append([f"{size[0]} x {size[1]}", *speeds, speeds[0] / speeds[1]])
    print(tabulate(rows, ["JPEG", *(f"{n}, images/s" for n in best), "ratio"], floatfmt=".2f"))


if __name__ == "__main__":
    main()
