"""Latency of a model and of its exports on this CPU: ``python -m benchmarks.exported``.

All of them take the same image in turn, round by round, with all cores. What is measured is the
network with its pre- and post-processing of tensors, without reading and resizing. The ratio is the
time of the accelerated model over that of the other, the median of all rounds.
"""

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from PIL import Image
from tabulate import tabulate

from miti_detr import add_miti_detr_config
from miti_detr.bench.inputs import random_inputs, random_weights
from miti_detr.engine import prepare_cpu
from miti_detr.engine.predictor import Predictor, load_config
from miti_detr.export import ExportOptions, TensorDetector
from miti_detr.export.export import make_record
from miti_detr.export.quantise import quantise
from miti_detr.export.writers import (
    add_onnx_record,
    record_program,
    write_onnx,
    write_openvino,
    write_program,
)
from miti_detr.predict.backends import pack
from miti_detr.predict.sessions import open_session

Call = Callable[[], Any]


def config(args: argparse.Namespace, accelerated: bool) -> CfgNode:
    """The config of the model; without weights it is random."""
    options = ["MODEL.DEVICE", "cpu", "MODEL.ACCELERATE", str(accelerated)]
    if args.weights:
        return load_config(weights=args.weights, overrides=options)
    cfg = get_cfg()
    add_miti_detr_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list([*options, "MODEL.WEIGHTS", ""])
    return cfg


def build(args: argparse.Namespace, items: list[dict[str, Any]], accelerated: bool) -> Any:
    """The model, trained or random."""
    cfg = config(args, accelerated)
    if args.weights:
        return Predictor(cfg).model
    model = build_model(cfg).eval()
    model.load_state_dict(random_weights(cfg, items))
    return model


def sessions(args: argparse.Namespace, model: Any, item: dict[str, Any], folder: Path) -> Any:
    """Export the model into a folder; yields names and functions of a batch."""
    cfg = config(args, False)
    options = ExportOptions(masks=not args.no_masks, top_k=args.top_k)
    float32 = dataclasses.replace(make_record(cfg, model, options), min_size=0)
    shape = (1, *item["image"].shape[-2:]) if args.static else None
    picture = folder / "calibration.png"
    Image.fromarray(item["image"].permute(1, 2, 0).numpy()).save(picture)
    masks = options.masks and model.predicts_masks
    detector = TensorDetector(model, masks=masks, top_k=options.top_k)
    program = record_program(detector, shape=shape, image_type="uint8")
    files = {"torch.export": folder / "float32.pt2", "ONNX": folder / "float32.onnx"}
    write_program(program, float32, files["torch.export"])
    write_onnx(program, files["ONNX"])
    add_onnx_record(files["ONNX"], float32)
    files["ONNX INT8"] = folder / "int8.onnx"
    quantise(files["ONNX"], files["ONNX INT8"], [picture])
    add_onnx_record(files["ONNX INT8"], dataclasses.replace(float32, precision="int8"))
    for name in ("ONNX", "ONNX INT8"):
        target = name.replace("ONNX", "OpenVINO")
        files[target] = files[name].with_suffix(".xml")
        record = open_session(files[name], "cpu").record
        write_openvino(files[name], record, files[target])
    for name, file in files.items():
        yield name, open_session(file, "cpu").run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/coco/miti_detr_R50.yaml")
    parser.add_argument("--weights", help="checkpoint instead of a config with random weights")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 672), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-masks", action="store_true", help="as miti-detr export")
    parser.add_argument("--top-k", type=int, metavar="K", help="as miti-detr export")
    parser.add_argument("--static", action="store_true", help="graphs of this one shape")
    args = parser.parse_args()
    prepare_cpu()
    items = random_inputs(3, batch=1, sizes=(tuple(args.size),))
    images, sizes = pack([{"image": items[0]["image"].numpy()}])
    plain, fast = (build(args, items, accelerated) for accelerated in (False, True))
    calls: dict[str, Call] = {
        "eager, plain": lambda: plain(items),
        "eager, accelerated": lambda: fast(items),
    }
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        for kind, run in sessions(args, plain, items[0], Path(name)):
            calls[kind] = functools.partial(run, images, sizes)
        seconds = measure(calls, args.rounds)
    base = np.array(seconds["eager, accelerated"])
    rows = [
        [kind, f"{1e3 * statistics.median(taken):.1f}", f"{np.median(base / taken):.2f}x"]
        for kind, taken in seconds.items()
    ]
    height, width = args.size
    title = f"{args.weights or args.config_file}, 1 x {height} x {width}"
    print(f"{title}, {torch.get_num_threads()} threads, {args.rounds} rounds")
    print(tabulate(rows, headers=["", "ms", "as fast as accelerated"], tablefmt="github"))


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in turn; two warm-up rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            time.sleep(0.05)  # until the threads of the call before no longer spin
            start = time.perf_counter()
            call()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
