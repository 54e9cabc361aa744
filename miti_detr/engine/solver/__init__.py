"""How the weights change: optimizer, schedule and averages."""

from .optimizer import build_optimizer, frozen_norms, is_backbone

__all__ = ["build_optimizer", "frozen_norms", "is_backbone"]
