"""One training step: forward, check, backward, update."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from .hooks import NonFiniteGuard
from .parallel import Batch, count_objects, gradients_kept, part_of_batch, split_batch
from .seed import seed_step


class TrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with four differences.

    - The random numbers of a step are a function of (seed, iteration, rank, part), see
      :mod:`miti_detr.engine.seed`.
    - A loss or gradient that is not finite stops the run before the weights change.
    - Mixed precision also works on CPUs, which Detectron2's ``AMPTrainer`` refuses.
    - A batch may come in parts, whose gradients are added up. The step is that of the whole batch,
      except that each part is padded and normalised by batch norms on its own.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        guard: NonFiniteGuard,
        amp_dtype: torch.dtype | None = None,
        frozen_norms: Sequence[nn.Module] = (),
        parts: int = 1,
    ) -> None:
        """Take the built parts.

        Args:
            model: returns a dict of weighted losses; may be wrapped for several processes.
            data_loader: iterable of batches, lists of Detectron2's dataset dicts.
            optimizer: of the model's parameters.
            seed: of the run, at least 0.
            guard: stops the run when a value is not finite.
            amp_dtype: precision of autocast; None: no mixed precision.
            frozen_norms: normalisations of the model that stay in evaluation mode.
            parts: into how many parts each batch of this process is cut.
        """
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.guard = guard
        self.amp_dtype = amp_dtype
        self.frozen_norms = frozen_norms
        self.parts = parts
        self.device_type = next(model.parameters()).device.type
        # Without scaling, small float16 gradients vanish; bfloat16 has the range of float32.
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=amp_dtype is torch.float16
        )

    def run_step(self) -> None:
        """Do one step with the next batch.

        Raises:
            NonFiniteError: a loss, or the norm of the gradients, is not finite.
        """
        assert self.model.training, "the model was changed to eval mode"
        for norm in self.frozen_norms:  # an evaluation has put the whole model into training mode
            norm.eval()
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        losses = self._backward(batch)
        self.after_backward()
        self._write_metrics(losses, data_time)
        try:
            self.grad_scaler.step(self.optimizer)
        except FloatingPointError as error:  # of the full-model clipping
            self.guard.stop(self.model, batch, losses, self.iter, str(error))
        self.grad_scaler.update()

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """Add up the gradients of all parts of a batch, and return its losses."""
        counts, losses = count_objects(batch), dict[str, Tensor]()
        parts = split_batch(batch, self.parts)
        for index, part in enumerate(parts):
            # Seed after reading the batch, because reading may draw random numbers here.
            seed_step(self.seed, self.iter, comm.get_rank(), index)
            with gradients_kept(self.model, index < len(parts) - 1):
                found = self._losses(part, counts)
                total: Any = sum(found.values())
                if not torch.isfinite(total):
                    reason, place = "the loss is not finite", (index, counts)
                    self.guard.stop(self.model, part, found, self.iter, reason, part=place)
                self.grad_scaler.scale(total).backward()
            for name, loss in found.items():
                losses[name] = losses[name] + loss.detach() if name in losses else loss.detach()
        return losses

    def _losses(self, part: Batch, counts: Sequence[int]) -> dict[str, Tensor]:
        dtype = self.amp_dtype
        with (
            part_of_batch(self.model, part, counts) as factor,
            torch.autocast(self.device_type, dtype, enabled=dtype is not None),
        ):
            losses: dict[str, Tensor] = self.model(part)
        return losses if factor == 1 else {k: v * factor for k, v in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer and of the gradient scaler."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        The scale is skipped if one of the two runs has none, because it used bfloat16 or no mixed
        precision.
        """
        super().load_state_dict(state_dict)
        scale = state_dict.get("grad_scaler")
        if scale:
            self.grad_scaler.load_state_dict(scale)
