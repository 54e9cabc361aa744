"""The part of a trainer that stops and resumes runs without a trace."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, hooks
from detectron2.utils import comm
from torch import nn

from .hooks import BestCheckpointer, EarlyStop, Plan, RunWriters, StepLog
from .parallel import unwrapped
from .resume import (
    History,
    check_resumable,
    log_changes,
    read_results,
    restore_history,
    restore_rates,
    save_history,
    save_schedule,
    skip_batches,
)
from .solver import WeightAverage
from .step.train_step import TrainStep

logger = logging.getLogger(__name__)

# Hooks that act on an iteration after its checkpoint was written
_AFTER_CHECKPOINT = (hooks.EvalHook, BestCheckpointer, EarlyStop, StepLog, RunWriters)


class StoppedEarly(BaseException):
    """Leaves Detectron2's training loop, which logs an ``Exception`` as an error."""


class ResumableTrainer(DefaultTrainer):
    """Detectron2's default trainer, whose runs are the same whether or not they are interrupted.

    A subclass sets the attributes before a run is resumed.

    Attributes:
        cfg: resolved config of the run.
        first_record: first iteration that the hooks record.
    """

    cfg: CfgNode
    _trainer: TrainStep
    _average: WeightAverage | None
    _early_stop: EarlyStop | None
    _evaluation: hooks.EvalHook
    _plan: Plan
    _is_restored = False
    _history: History | None = None  # of the resumed run
    _evaluated = -1  # last iteration whose weights were evaluated

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume the run in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS`` for a new one.

        Args:
            resume: continue from the last checkpoint if there is one. Its seed is the seed of the
                run.
        """
        if resume:
            check_resumable(self.cfg.OUTPUT_DIR)
        first = _first_of_transformer(self.model).clone()
        super().resume_or_load(resume)
        self._plan.from_scratch = torch.equal(first, _first_of_transformer(self.model))
        if resume and self.checkpointer.has_checkpoint() and not self._is_restored:
            raise ValueError(
                f"{self.checkpointer.get_checkpoint_file()} has weights but no state of a run to "
                "resume. Name it as MODEL.WEIGHTS of a new run with another OUTPUT_DIR."
            )
        if self._average is not None and not self._average.steps:
            self._average.restart()  # with the weights that were loaded
        if self.start_iter > 0:
            logger.info("resuming at iteration %d of %d", self.start_iter, self.max_iter)
            restore_rates(self.scheduler, self.optimizer)
            skip_batches(self.data_loader, self.start_iter)

    @property
    def first_record(self) -> int:
        """First iteration that the hooks record: the last one of the resumed checkpoint again."""
        return self.start_iter if self._history is None else max(self.start_iter - 1, 0)

    def before_train(self) -> None:
        """Call the hooks, and complete the last iteration of a resumed run.

        The checkpoint is written before the evaluation and the records of its iteration. A run that
        was stopped in between makes up for them here.
        """
        history, last = self._history, self.start_iter - 1
        if history is None or self.start_iter == 0:
            super().before_train()
            return
        results = read_results(self.cfg.OUTPUT_DIR, history, last)
        super().before_train()
        is_evaluated = any(comm.all_gather(bool(results))) or self._evaluated == last
        restore_history(self.storage, history)
        self.iter: int = last
        self.storage.iter = last
        self.storage.put_scalars(**results, smoothing_hint=False)
        for hook in self._hooks:
            repeated = isinstance(hook, _AFTER_CHECKPOINT)
            if repeated and not (is_evaluated and hook is self._evaluation):
                hook.after_step()
        self._stop_early()
        self.iter = self.storage.iter = self.start_iter

    def _stop_early(self) -> None:
        if self._early_stop is not None and self._early_stop.reason:
            raise StoppedEarly(self._early_stop.reason)

    def state_dict(self) -> dict[str, Any]:
        """State of the run, with its seed, its schedule and its latest metrics."""
        self._trainer.write_record()
        state = {**super().state_dict(), "seed": self.cfg.SEED}
        state["schedule"] = save_schedule(self.cfg)
        if self._average is not None:
            state["average"] = self._average.state_dict()
        if storage := getattr(self, "storage", None):
            state |= {"history": save_history(storage), "evaluated": self._evaluated}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a run, and log what differs between its config and the current one."""
        super().load_state_dict(state_dict)
        self._is_restored = True
        self._history = state_dict.get("history")
        self._evaluated = state_dict.get("evaluated", -1)
        if self._average is not None and "average" in state_dict:
            self._average.load_state_dict(state_dict["average"])
        elif "average" in state_dict:
            raise ValueError(
                "SOLVER.EMA.ENABLED is False, but the checkpoint has averaged weights. Resume with "
                "True, or start a new run from the checkpoint as MODEL.WEIGHTS."
            )
        schedule = state_dict.get("schedule", {})
        parts = schedule.get("ACCUMULATE", 0)
        share = self.cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        if self.cfg.SOLVER.ACCUMULATE == 0 and parts and share % parts == 0:
            logger.info("SOLVER.ACCUMULATE %d of the resumed run is used", parts)
            self._use_parts(parts)
        log_changes(self.cfg, schedule)
        seed = state_dict.get("seed", self.cfg.SEED)
        if seed != self.cfg.SEED:
            logger.info("SEED %d of the resumed run is used, not %d", seed, self.cfg.SEED)
            self._reseed(seed)

    def _use_parts(self, parts: int) -> None:
        self.cfg.defrost()  # in place, as for the seed
        self.cfg.SOLVER.ACCUMULATE = self._trainer.parts = parts
        self.cfg.freeze()

    def _reseed(self, seed: int) -> None:
        self.cfg.defrost()  # in place: the checkpointers and the guard hold it, too
        self.cfg.SEED = self._trainer.seed = seed
        self.cfg.freeze()
        self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg))


def _first_of_transformer(model: nn.Module) -> torch.Tensor:
    """A weight by which random and loaded transformers are told apart."""
    return next(getattr(unwrapped(model), "transformer", model).parameters()).detach()
