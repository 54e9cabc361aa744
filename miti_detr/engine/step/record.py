"""What a training step logs, from the device to the event storage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, distributed, nn

from miti_detr.engine.hooks import NonFiniteGuard
from miti_detr.engine.parallel import Batch
from miti_detr.scalars import Collected, HostCopy, stack_scalars

GRAD_NORM = "grad_norm"


@dataclass(frozen=True)
class StepRecord:
    """The scalars of one step, all in one copy to the host.

    Attributes:
        iteration: index of the step.
        parts: the batch of this process.
        counts: objects of each image of that batch.
        names: of the losses, which every part has.
        others: names of what else is logged.
        data_time: seconds that this process waited for its batch.
        copy: (processes, values): the losses of each part, the others, ``data_time``, and whether
            the device has found the step to be bad.
    """

    iteration: int
    parts: Sequence[Batch]
    counts: Sequence[int]
    names: Sequence[str]
    others: Sequence[str]
    data_time: float
    copy: HostCopy

    @classmethod
    def start(
        cls,
        iteration: int,
        parts: Sequence[Batch],
        counts: Sequence[int],
        losses: Sequence[Mapping[str, Tensor]],
        others: Collected,
        *,
        data_time: float,
        bad: Tensor,
    ) -> "StepRecord":
        """Start the copy; arguments as the attributes, with ``losses`` of each part."""
        values = [loss for part in losses for loss in part.values()]
        values += [torch.stack(found).mean() for found in others.values()]
        vector = stack_scalars([*values, bad.new_full((), data_time), bad])
        rows = [vector]
        if comm.get_world_size() > 1:
            rows = [torch.empty_like(vector) for _ in range(comm.get_world_size())]
            distributed.all_gather(rows, vector)
        copy = HostCopy(torch.stack(rows))
        return cls(iteration, parts, counts, [*losses[0]], [*others], data_time, copy)

    def write(self, model: nn.Module, guard: NonFiniteGuard) -> None:
        """Put the means over the processes into the event storage.

        Raises:
            NonFiniteError: the step was bad.
        """
        rows = self.copy.read()
        if any(row[-1] for row in rows):
            self._stop(rows[comm.get_rank()], model, guard)
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", self.data_time, cur_iter=self.iteration)
        if not comm.is_main_process():
            return
        losses: dict[str, float] = {}
        for index, name in enumerate(self.names):
            sums = [sum(row[index : self._num_losses : len(self.names)]) for row in rows]
            losses[name] = float(np.mean(sums))
        data_time = max(row[-2] for row in rows)
        storage.put_scalar("data_time", data_time, cur_iter=self.iteration)
        storage.put_scalar("total_loss", sum(losses.values()), cur_iter=self.iteration)
        means = zip(self.others, np.mean(rows, axis=0)[self._num_losses : -2].tolist(), strict=True)
        storage.put_scalars(cur_iter=self.iteration, **losses, **dict(means))

    @property
    def _num_losses(self) -> int:
        return len(self.names) * len(self.parts)

    def _stop(self, row: Sequence[float], model: nn.Module, guard: NonFiniteGuard) -> None:
        """End the run with the part that was bad, or the whole batch."""
        length = len(self.names)
        for index, part in enumerate(self.parts):
            values = torch.tensor(row[index * length : (index + 1) * length])
            if not torch.isfinite(values.sum()):
                losses = dict(zip(self.names, values, strict=True))
                reason, place = "the loss is not finite", (index, self.counts)
                guard.stop(model, part, losses, self.iteration, reason, part=place)
        sums = torch.tensor(row[: self._num_losses]).view(-1, length).sum(0)
        norm = dict(zip(self.others, row[self._num_losses :], strict=False)).get(GRAD_NORM, 0.0)
        reason = f"the norm of the gradients is {norm}"
        if math.isfinite(norm):
            reason = "the loss of another process is not finite"
        batch = [inputs for part in self.parts for inputs in part]
        guard.stop(model, batch, dict(zip(self.names, sums, strict=True)), self.iteration, reason)
