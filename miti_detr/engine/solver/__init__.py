"""How the weights change: optimizer, schedule and averages."""

from .ema import WeightAverage
from .optimizer import build_optimizer, frozen_norms, is_backbone
from .schedule import num_images, resolve_schedule

__all__ = [
    "WeightAverage",
    "build_optimizer",
    "frozen_norms",
    "is_backbone",
    "num_images",
    "resolve_schedule",
]
