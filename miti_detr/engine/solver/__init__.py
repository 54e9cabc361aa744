"""How the weights change: optimizer, schedule and averages."""

from .ema import WeightAverage
from .optimizer import build_optimizer, frozen_norms, is_backbone
from .schedule import build_scheduler, num_images, resolve_schedule, scale_to_batch

__all__ = [
    "WeightAverage",
    "build_optimizer",
    "build_scheduler",
    "frozen_norms",
    "is_backbone",
    "num_images",
    "resolve_schedule",
    "scale_to_batch",
]
