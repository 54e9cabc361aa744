"""How the weights change, beside the optimizer: schedule, averages, frozen parts."""

from .ema import WeightAverage
from .freeze import freeze, frozen_norms, is_backbone
from .schedule import build_scheduler, num_images, resolve_schedule, scale_to_batch

__all__ = [
    "WeightAverage",
    "build_scheduler",
    "freeze",
    "frozen_norms",
    "is_backbone",
    "num_images",
    "resolve_schedule",
    "scale_to_batch",
]
