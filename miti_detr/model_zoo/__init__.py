"""The YAML files and trained models of this project, in a clone and in an installed package."""

import difflib
from pathlib import Path

from .zoo import ZooModel, find_zoo_weights, zoo_models

__all__ = ["ZooModel", "find_zoo_weights", "get_config_file", "zoo_models"]


def _config_root() -> Path:
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def get_config_file(config_path: str) -> str:
    """Return the path of a config file of this project.

    The counterpart of :func:`detectron2.model_zoo.get_config_file`, without ``pkg_resources``.

    Args:
        config_path: name below ``configs/``, such as ``"coco/miti_detr_R50_300ep.yaml"``.

    Returns:
        The absolute path of the YAML file.

    Raises:
        FileNotFoundError: there is no such config; the message names the nearest ones.
    """
    root = _config_root()
    path = root / config_path
    if path.is_file():
        return str(path.resolve())
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.yaml"))
    near = difflib.get_close_matches(config_path, names, n=3, cutoff=0.4) or names
    raise FileNotFoundError(f"no config {config_path!r} in {root}; there is: {', '.join(near)}")
