"""Says before a run what it is going to do, and soon after how long that takes."""

import logging

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from miti_detr.engine.solver.plan import describe_speed, log_plan

logger = logging.getLogger(__name__)

_MEASURED = 8  # iterations
_FIRST = 4  # iterations that are not measured


class Plan(HookBase):
    """Logs the plan of a run, and its time at the measured speed."""

    def __init__(self, cfg: CfgNode, num_images: int | None, *, from_scratch: bool = True) -> None:
        """Take what the plan depends on.

        Args:
            cfg: of the run, with a resolved schedule.
            num_images: of the training set; None if it is not known.
            from_scratch: the transformer has random weights.
        """
        self.cfg = cfg
        self.num_images = num_images
        self.from_scratch = from_scratch

    def before_train(self) -> None:
        """Log the plan."""
        log_plan(
            self.cfg,
            num_images=self.num_images,
            start=self.trainer.start_iter,
            from_scratch=self.from_scratch,
        )

    def after_step(self) -> None:
        """Log the speed of the first iterations."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        left = self.trainer.max_iter - self.trainer.iter - 1
        if done == _FIRST + _MEASURED and left > 0:
            seconds = self.trainer.storage.history("time").median(_MEASURED)
            logger.info("%s", describe_speed(seconds, left))
