"""Records the measures of ``miti-detr rank`` during training."""

import math
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.engine import HookBase
from torch import nn

from miti_detr.data import build_mapper
from miti_detr.rank import measure_rank

# Measures that can be interpreted on their own; the terms of equation (14) are left out.
_LOGGED = (
    "residual",
    "residual_fro",
    "cosine",
    "effective_rank",
    "stable_rank",
    "std",
    "entropy_self",
    "entropy_cross",
)


class RankHook(HookBase):
    """Periodically measures the token matrices of a few fixed images.

    At iteration i it measures the weights with which step i begins, so iteration 0 shows the
    initial weights. It also measures the final weights. The scalars are called
    ``rank/<stack>/layer<l>/<measure>`` and are means over the images. The hook does not
    change the training by a single bit: it measures in evaluation mode and restores the states of
    the random number generators.
    """

    def __init__(self, inputs: list[dict[str, Any]], *, period: int) -> None:
        """Choose what is measured, and how often.

        Args:
            inputs: Detectron2's dataset dicts, each of which is one batch; see :meth:`on_dataset`.
            period: iterations between two measurements. Detectron2 writes metrics every 20
                iterations, and only the last of several values in between.

        Raises:
            ValueError: ``period`` is not positive.
        """
        if period < 1:
            raise ValueError(f"period is {period}; it must be at least 1")
        self.period = period
        self.inputs = inputs

    @classmethod
    def on_dataset(cls, cfg: CfgNode, *, period: int, num_images: int = 2) -> "RankHook":
        """Measure images of a data set, evenly spread, as evaluation sees them.

        Args:
            cfg: of the run; the images are of the first data set of ``DATASETS.TEST``, or of
                ``TRAIN`` where that is empty.
            period: iterations between two measurements.
            num_images: how many.
        """
        name = next(iter(cfg.DATASETS.TEST or cfg.DATASETS.TRAIN))
        with _random_states_kept():
            records = get_detection_dataset_dicts([name], filter_empty=False)
            count = min(num_images, len(records))
            chosen = np.linspace(0, len(records) - 1, count).round().astype(int).tolist()
            mapper = build_mapper(cfg, is_train=False)
            inputs = [mapper(records[index]) for index in chosen]
        return cls([x for x in inputs if x is not None], period=period)

    def before_step(self) -> None:
        """Measure every ``period`` iterations."""
        if self.trainer.iter % self.period == 0:
            self._measure()

    def after_train(self) -> None:
        """Measure the final weights of a run that has come to its end."""
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._measure()

    def _measure(self) -> None:
        model = getattr(self.trainer.model, "module", self.trainer.model)
        totals: dict[str, list[float]] = {}
        with _random_states_kept():
            for item in self.inputs:
                for name, values in self._measure_image(model, item):
                    totals.setdefault(name, []).extend(values)
        means = {name: statistics.fmean(values) for name, values in totals.items() if values}
        finite = {name: value for name, value in means.items() if math.isfinite(value)}
        self.trainer.storage.put_scalars(smoothing_hint=False, **finite)

    def _measure_image(self, model: nn.Module, item: Any) -> Iterator[tuple[str, list[float]]]:
        try:
            stacks = measure_rank(model, [item])
        except ValueError as error:
            raise ValueError(f"RankHook cannot measure this model: {error}") from error
        for stack, layers in stacks.items():
            for index, measures in enumerate(layers):
                for key in _LOGGED:
                    yield f"rank/{stack}/layer{index}/{key}", measures.get(key, [])


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put the states of all global generators back afterwards."""
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
