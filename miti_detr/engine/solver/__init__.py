"""How the weights change: optimizer, schedule and averages."""

from .ema import WeightAverage
from .freeze import freeze, frozen_norms, is_backbone
from .optimizer import build_optimizer
from .schedule import build_scheduler, num_images, resolve_schedule, scale_to_batch

__all__ = [
    "WeightAverage",
    "build_optimizer",
    "build_scheduler",
    "freeze",
    "frozen_norms",
    "is_backbone",
    "num_images",
    "resolve_schedule",
    "scale_to_batch",
]
