"""One training step: forward, check, backward, update."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, distributed, nn

from miti_detr.engine.hooks import NonFiniteGuard
from miti_detr.engine.parallel import (
    Batch,
    count_objects,
    gradients_kept,
    part_of_batch,
    split_batch,
)
from miti_detr.engine.seed import seed_step
from miti_detr.scalars import collected_scalars

from .prefetch import Prefetcher
from .record import StepRecord


class TrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with five differences.

    - The random numbers of a step are a function of (seed, iteration, rank, part), see
      :mod:`miti_detr.engine.seed`.
    - A loss or gradient that is not finite stops the run before the weights change.
    - Mixed precision also works on CPUs, which Detectron2's ``AMPTrainer`` refuses.
    - A batch may come in parts, whose gradients are added up. The step is that of the whole batch,
      except that each part is padded and normalised by batch norms on its own.
    - Everything that is logged is copied to the host at once. If the step is ``late``, the host
      does not wait for this copy: the next step reads it, and until then the device itself keeps
      the weights as they were before the first step whose loss or gradient is not finite.
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
        late: bool | None = None,
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
            parts: into how many parts each batch of this process is cut; 0: not known yet.
            late: needs a fused optimizer. None: on a GPU, except with float16, whose gradient
                scaler waits for the device in any case.
        """
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.guard = guard
        self.amp_dtype = amp_dtype
        self.frozen_norms = frozen_norms
        self.parts = parts
        self.device = next(model.parameters()).device
        # Without scaling, small float16 gradients vanish; bfloat16 has the range of float32.
        is_scaled = amp_dtype is torch.float16
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=is_scaled)
        if late is None:
            is_fused = all(group.get("fused") for group in optimizer.param_groups)
            late = self.device.type == "cuda" and is_fused and not is_scaled
        self.late = late
        self._bad = torch.zeros((), device=self.device)
        if late:  # while this is not 0, a fused optimizer changes nothing
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        self._record: StepRecord | None = None  # of the last step, until it is written

    _data_loader_iter_obj: Iterator[Batch] | None

    @property
    def _data_loader_iter(self) -> Iterator[Batch]:
        if self._data_loader_iter_obj is None:
            found: Iterator[Batch] = iter(self.data_loader)
            self._data_loader_iter_obj = Prefetcher(found, self.device) if self.late else found
        return self._data_loader_iter_obj

    def run_step(self) -> None:
        """Do one step with the next batch.

        Raises:
            NonFiniteError: a loss, or the norm of the gradients, is not finite.
        """
        assert self.model.training, "the model was changed to eval mode"
        for norm in self.frozen_norms:  # an evaluation has put the whole model into training mode
            norm.eval()
        start = time.perf_counter()
        batches = self._data_loader_iter
        batch = next(batches)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        parts, counts = split_batch(batch, self.parts), count_objects(batch)
        with collected_scalars() as others:
            losses = self._backward(parts, counts)
            self.after_backward()
            error = self._update()
        record = StepRecord.start(
            self.iter, parts, counts, losses, others, data_time=data_time, bad=self._bad
        )
        if isinstance(batches, Prefetcher):
            batches.fetch()
        self.write_record()
        self._record = record
        if not self.late:
            self.write_record()
        if error:
            total = {k: torch.stack([part[k] for part in losses]).sum() for k in losses[0]}
            self.guard.stop(self.model, batch, total, self.iter, error)

    def write_record(self) -> None:
        """Write what the last step logs, if that is not done.

        Raises:
            NonFiniteError: a loss, or the norm of the gradients, was not finite in that step.
        """
        record, self._record = self._record, None
        if record is not None:
            record.write(self.model, self.guard)

    def _backward(self, parts: Sequence[Batch], counts: Sequence[int]) -> list[dict[str, Tensor]]:
        """Add up the gradients of the parts of a batch, and return their losses."""
        losses = []
        for index, part in enumerate(parts):
            # Seed after reading the batch, because reading may draw random numbers here.
            seed_step(self.seed, self.iter, comm.get_rank(), index)
            with gradients_kept(self.model, index < len(parts) - 1):
                found = self._losses(part, counts)
                total: Any = sum(found.values())
                losses.append({name: loss.detach() for name, loss in found.items()})
                if self.late:
                    self._bad.logical_or_(~torch.isfinite(total.detach()))
                elif not torch.isfinite(total):
                    reason, place = "the loss is not finite", (index, counts)
                    self.guard.stop(self.model, part, losses[-1], self.iter, reason, part=place)
                self.grad_scaler.scale(total).backward()
        return losses

    def _losses(self, part: Batch, counts: Sequence[int]) -> dict[str, Tensor]:
        dtype = self.amp_dtype
        with (
            part_of_batch(self.model, part, counts) as factor,
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
        ):
            losses: dict[str, Tensor] = self.model(part)
        return losses if factor == 1 else {k: v * factor for k, v in losses.items()}

    def _update(self) -> str:
        """Change the weights; says why they cannot be changed, or nothing."""
        if self.late and comm.get_world_size() > 1:
            distributed.all_reduce(self._bad, op=distributed.ReduceOp.MAX)
        try:
            self.grad_scaler.step(self.optimizer)
        except FloatingPointError as error:  # of the full-model clipping
            return str(error)
        self.grad_scaler.update()
        return ""

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
