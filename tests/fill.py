"""Deterministic weights and images, which depend only on their names.

The goldens were computed with them, and both sides of a parity test can be filled alike.
"""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
    return np.random.RandomState(seed).random_sample(shape)


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """Values of the tensor with the published state-dict key ``key``, float32."""
    u = _uniform(key, shape)
    s = 2 * u - 1
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        values = 0.5 + u
    elif last == "running_mean" or (len(shape) == 1 and last in ("bias", "in_proj_bias")):
        values = 0.1 * s
    elif len(shape) == 1:
        values = 0.5 + 0.5 * u if "backbone" in key else 1 + 0.1 * s
    elif key.endswith("query_embed.weight"):
        values = 3**0.5 * s
    else:
        values = _matrix(key, last, s)
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _matrix(key: str, last: str, s: np.ndarray) -> np.ndarray:
    fan_in = int(np.prod(s.shape[1:]))
    values = (3 / fan_in) ** 0.5 * s * (2**0.5 if s.ndim == 4 else 1)
    if last == "in_proj_weight":
        values[: 2 * s.shape[1]] *= 3
    for parts, gain in (
        (("class_embed",), 2),
        (("encoder", "out_proj"), 0.3),
        (("encoder", "linear2"), 0.3),
        (("decoder", "out_proj"), 2),
        (("decoder", "linear2"), 0.5),
        (("input_proj",), 0.1),
    ):
        if all(part in key for part in parts):
            values = values * gain
    return values


def filled(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """A state dict of the same keys and shapes, each filled by ``prefix`` + key."""
    return {key: fill(prefix + key, tuple(value.shape)) for key, value in state_dict.items()}


def image(name: str, height: int, width: int) -> Tensor:
    """A picture of 16-pixel blocks, (3, height, width) float32 in 0..255."""
    seed = zlib.crc32(name.encode()) & 0xFFFFFFFF
    cells = np.random.RandomState(seed).randint(0, 256, (3, -(-height // 16), -(-width // 16)))
    pixels = cells.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    return torch.from_numpy(np.ascontiguousarray(pixels)).float()
