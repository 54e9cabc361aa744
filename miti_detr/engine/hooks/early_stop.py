"""Stops a run that no longer improves."""

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class EarlyStop(HookBase):
    """Ends a run after some evaluations without a better result; all processes agree.

    A value is better if it is above the best one by more than ``min_delta``. Of a metric whose name
    has ``loss`` in it, lower values are better. The count of evaluations is saved with the run.

    Attributes:
        reason: why the run is over; empty as long as it is not.
    """

    def __init__(self, *, patience: int, min_delta: float, metric: str, period: int) -> None:
        """Set the rule.

        Args:
            patience: evaluations in a row without a better result, at least 1.
            min_delta: at least 0, in the unit of the metric.
            metric: name in the event storage, such as ``bbox/AP``.
            period: iterations between two evaluations.
        """
        self.patience = patience
        self.min_delta = min_delta
        self.metric = metric
        self.period = period
        self._sign = -1 if "loss" in metric else 1
        self._best = -math.inf
        self._best_iteration = -1
        self._last_iteration = -1  # of the last evaluation that was counted
        self._count = 0
        self._is_over = False

    @classmethod
    def from_config(cls, cfg: CfgNode, metric: str) -> "EarlyStop | None":
        """Make what ``SOLVER.EARLY_STOP`` asks for; None if it asks for nothing.

        Args:
            cfg: of the run.
            metric: where ``SOLVER.EARLY_STOP.METRIC`` is empty.
        """
        stop = cfg.SOLVER.EARLY_STOP
        if stop.PATIENCE == 0:
            return None
        return cls(
            patience=stop.PATIENCE,
            min_delta=stop.MIN_DELTA,
            metric=stop.METRIC or metric,
            period=cfg.TEST.EVAL_PERIOD,
        )

    @property
    def reason(self) -> str:
        """Why the run is over, and how it would continue; empty as long as it is not."""
        if not self._is_over:
            return ""
        best = "none was a number"
        if self._best_iteration >= 0:
            value = self._sign * self._best
            best = f"the best was {value:.5g} at iteration {self._best_iteration}"
        return (
            f"stopped early after iteration {self._last_iteration}: {self._count} evaluations in a "
            f"row have not improved {self.metric} by more than {self.min_delta:g}; {best}. To "
            f"continue, resume with SOLVER.EARLY_STOP.PATIENCE above {self._count} (0: no limit)."
        )

    def after_step(self) -> None:
        """Look at the result of an evaluation; the last one of a run does not matter."""
        step = self.trainer.iter + 1
        if step % self.period or step >= self.trainer.max_iter:
            return
        if comm.is_main_process() and self.trainer.iter > self._last_iteration:
            self._count_evaluation(self.trainer.iter)
        self._decide()

    def _count_evaluation(self, iteration: int) -> None:
        latest = self.trainer.storage.latest()
        value, found = latest.get(self.metric, (math.nan, -1))
        if found != iteration:
            known = sorted(k for k, (_, i) in latest.items() if "/" in k and i == iteration)
            raise ValueError(
                f"SOLVER.EARLY_STOP.METRIC is {self.metric!r}, which the evaluation does not give. "
                f"Choose one of {', '.join(known) or 'none'}."
            )
        self._last_iteration = iteration
        self._count += 1
        if self._sign * value > self._best + (self.min_delta if self._best_iteration >= 0 else 0):
            self._best, self._best_iteration = self._sign * value, iteration
            self._count = 0

    def _decide(self) -> None:
        """Take over what the main process has counted."""
        counted = comm.all_gather(self.state_dict())[0]
        self.load_state_dict(counted)

    def state_dict(self) -> dict[str, Any]:
        """What was counted; plain values."""
        best = (self._best, self._best_iteration, self._last_iteration, self._count)
        return {"metric": self.metric, "counted": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what was counted, unless it is of another metric."""
        if state["metric"] != self.metric:
            logger.info(
                "SOLVER.EARLY_STOP.METRIC was %s, is now %s: evaluations are counted from here on",
                *(state["metric"], self.metric),
            )
            return
        self._best, self._best_iteration, self._last_iteration, self._count = state["counted"]
        self._is_over = self._count >= self.patience
