"""Rank collapse: how alike the tokens of an image become from layer to layer."""

from .collection import StackStates, eager_evaluation, measure_rank, record_states
from .measures import (
    attention_entropy,
    composite_norm,
    effective_rank,
    mean_cosine,
    measure_step,
    measure_tokens,
    published_residual,
    relative_residual,
    residual,
    singular_values,
    stable_rank,
)

__all__ = [
    "StackStates",
    "attention_entropy",
    "composite_norm",
    "eager_evaluation",
    "effective_rank",
    "mean_cosine",
    "measure_rank",
    "measure_step",
    "measure_tokens",
    "published_residual",
    "record_states",
    "relative_residual",
    "residual",
    "singular_values",
    "stable_rank",
]
