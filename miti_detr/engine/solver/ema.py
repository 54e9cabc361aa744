"""The exponential moving average (EMA) of the weights."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from miti_detr.checkpoint.variant import AVERAGE


class WeightAverage:
    """The average of weights over the last steps, in addition to the weights that are trained.

    It has everything of the model's state dict that changes in training: parameters with a gradient
    and buffers of floating point, on the same device and in the same layout. After step t (from 1)
    the average becomes ``d * average + (1 - d) * weights`` with ``d = decay * (1 - exp(-t /
    warmup))``, so that the first weights are soon forgotten. With a ``period`` of n steps this is
    done every n steps with d to the power of n.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: int = 0, period: int = 1) -> None:
        """Start with the current weights.

        Args:
            model: not wrapped for several processes.
            decay: d of one step, at least 0 and below 1.
            warmup: steps; 0: d is ``decay`` from the start.
            period: steps between two updates.
        """
        self.model = model
        self.decay = decay
        self.warmup = warmup
        self.period = period
        self.steps = 0
        self._is_swapped = False
        self._weights = _changing_tensors(model)
        self._averages = {name: tensor.clone() for name, tensor in self._weights.items()}

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "WeightAverage | None":
        """Make the average that ``SOLVER.EMA`` asks for; None if it asks for none."""
        ema = cfg.SOLVER.EMA
        if not ema.ENABLED:
            return None
        return cls(model, decay=ema.DECAY, warmup=ema.WARMUP, period=ema.PERIOD)

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past, and start with the current weights."""
        self.steps = 0
        for name, average in self._averages.items():
            average.copy_(self._weights[name])

    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        if self.steps % self.period == 0:
            grown = 1 - math.exp(-self.steps / self.warmup) if self.warmup else 1.0
            average = get_ema_multi_avg_fn((self.decay * grown) ** self.period)
            average([*self._averages.values()], [*self._weights.values()], self.steps)

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """While entered, the model has the average, and says so to checkpoints."""
        if self._is_swapped:
            yield
            return
        self._swap()
        text = f"EMA of the weights of {self.steps} steps, decay {self.decay:g}"
        setattr(self.model, AVERAGE, text)
        try:
            yield
        finally:
            delattr(self.model, AVERAGE)
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        """What the model does not have: the average, or within :meth:`in_model` the weights."""
        kind = "weights" if self._is_swapped else "averages"
        return {"steps": self.steps, kind: dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average, and the weights if the state has these.

        Args:
            state: of :meth:`state_dict`, at a time at which the model had what it has now.

        Raises:
            ValueError: other tensors were averaged.
        """
        found = state.get("weights", state.get("averages", {}))
        if different := found.keys() ^ self._averages.keys():
            raise ValueError(
                f"the average of the resumed run is of other weights: {min(different)} is not in "
                "both. Resume with the SOLVER.FREEZE and BACKBONE_MULTIPLIER of that run, or start "
                "a new run from its weights."
            )
        self.steps = state["steps"]
        for name, average in self._averages.items():
            average.copy_(found[name])
        if "weights" in state:
            self._swap()
            self._is_swapped = False

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self._averages.items():
            weight = self._weights[name]
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._is_swapped = not self._is_swapped


def _changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the state dict that training changes, by name."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    tensors = model.state_dict(keep_vars=True)
    return {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name not in frozen
    }
