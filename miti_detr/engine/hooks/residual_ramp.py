"""The strength of the layer residual during training."""

import logging
from typing import Any

from detectron2.engine import HookBase

logger = logging.getLogger(__name__)


class ResidualRamp(HookBase):
    """Raises the strength of the layer residual linearly from 0 at the first training step to 1.

    In step 0, a model with DETR's weights computes what DETR computes. The strength is a function
    of the iteration, so that a resumed run continues exactly. It is saved with the weights.
    """

    def __init__(self, iters: int) -> None:
        """Set the length of the ramp.

        Args:
            iters: first iteration with strength 1; 0: the strength is always 1.
        """
        self.iters = iters

    def before_train(self) -> None:
        """Log how the strength will change.

        Raises:
            ValueError: the model has no strength to ramp.
        """
        model = self._model()
        if not hasattr(model, "residual_strength"):
            if self.iters > 0:
                raise ValueError(
                    f"MODEL.DETR.RESIDUAL_RAMP_ITERS is {self.iters}, but {type(model).__name__} "
                    "has no layer residual: set it to 0"
                )
            return
        start, end = self._strength(self.trainer.start_iter), self._strength(self.trainer.max_iter)
        if start < 1:
            logger.info(
                "the strength of the layer residual rises from %.4g to %.4g; it reaches 1 at "
                "iteration %d",
                *(start, end, self.iters),
            )
        elif model.residual_strength < 1:
            logger.info(
                "the layer residual had strength %.4g in the weights; it is now 1",
                model.residual_strength,
            )

    def before_step(self) -> None:
        """Set the strength of this iteration."""
        model = self._model()
        if hasattr(model, "residual_strength"):
            model.residual_strength = self._strength(self.trainer.iter)

    def _strength(self, iteration: int) -> float:
        return min(iteration / self.iters, 1.0) if self.iters > 0 else 1.0

    def _model(self) -> Any:
        return getattr(self.trainer.model, "module", self.trainer.model)
