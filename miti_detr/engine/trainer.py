"""Detectron2's trainer on CPUs and GPUs, in one or several processes, with exact resume."""

import contextlib
import logging
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn

from miti_detr.data import build_test_loader, build_train_loader
from miti_detr.evaluation import build_evaluator, write_coco_table
from miti_detr.files import write_text

from .checkpointers import BestWeights, RunCheckpointer
from .hooks import (
    WRITE_PERIOD,
    BestCheckpointer,
    EarlyStop,
    NonFiniteGuard,
    ProgressBar,
    ResidualRamp,
    RunWriters,
    StepLog,
)
from .parallel import wrap_for_processes
from .resume import (
    History,
    check_resumable,
    has_final_results,
    log_changes,
    read_results,
    restore_history,
    restore_rates,
    save_history,
    save_schedule,
    skip_batches,
)
from .seed import resolve_seed
from .solver import (
    WeightAverage,
    build_optimizer,
    frozen_norms,
    num_images,
    resolve_schedule,
)
from .step.train_step import TrainStep
from .validation import with_losses

logger = logging.getLogger(__name__)

# Hooks that act on an iteration after its checkpoint was written
_AFTER_CHECKPOINT = (hooks.EvalHook, BestCheckpointer, EarlyStop, StepLog, RunWriters)


class _StoppedEarly(BaseException):
    """Leaves Detectron2's training loop, which logs an ``Exception`` as an error."""


class Trainer(DefaultTrainer):
    """Detectron2's default trainer for set prediction models.

    Stopping and resuming a run does not change its result. Each step
    (:mod:`miti_detr.engine.seed`) and the data stream (:mod:`miti_detr.data`) are functions of the
    seed and the iteration, so no state of a random number generator is stored. On a CPU, a resumed
    run equals one that never stopped to the last bit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build model, data, optimizer and hooks.

        Args:
            cfg: is copied; a negative ``SEED`` and a schedule in epochs are resolved in the copy,
                :attr:`cfg`.
        """
        super(DefaultTrainer, self).__init__()  # DefaultTrainer's own wraps for several GPUs only
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        cfg.defrost()
        resolve_seed(cfg)
        seed_all_rng(cfg.SEED)
        model = self.build_model(cfg)
        data_loader = self.build_train_loader(cfg)
        resolve_schedule(cfg, num_images(data_loader))
        cfg.freeze()
        self.cfg = cfg

        optimizer = self.build_optimizer(cfg, model)
        wrapped = wrap_for_processes(model)
        amp = cfg.SOLVER.AMP
        self._trainer = TrainStep(
            wrapped,
            data_loader,
            optimizer,
            seed=cfg.SEED,
            guard=NonFiniteGuard(cfg),
            amp_dtype=getattr(torch, amp.PRECISION) if amp.ENABLED else None,
            frozen_norms=frozen_norms(cfg, model),
            parts=cfg.SOLVER.ACCUMULATE,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self._average = WeightAverage.from_config(cfg, model)
        self.checkpointer = RunCheckpointer(
            wrapped,
            cfg.OUTPUT_DIR,
            average=self._average,
            cfg=cfg,
            trainer=weakref.proxy(self),
        )
        self._is_restored = False
        self._history: History | None = None  # of the resumed run
        self._evaluated = -1  # last iteration whose weights were evaluated
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume the run in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS`` for a new one.

        Args:
            resume: continue from the last checkpoint if there is one. Its seed is the seed of the
                run.
        """
        if resume:
            check_resumable(self.cfg.OUTPUT_DIR)
        super().resume_or_load(resume)
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

    def train(self) -> OrderedDict[str, Any] | None:
        """Train to ``SOLVER.MAX_ITER`` and evaluate.

        A run that is finished and evaluated is not changed.

        Returns:
            The last evaluation results; None if there are none.
        """
        has_results = not self.cfg.DATASETS.TEST or has_final_results(
            self.cfg.OUTPUT_DIR, self.max_iter
        )
        if self.start_iter >= self.max_iter and all(comm.all_gather(has_results)):
            logger.info(
                "already finished: %d of %d iterations are done. To continue, raise "
                "SOLVER.MAX_ITER or EPOCHS. To start again, choose another OUTPUT_DIR.",
                self.start_iter,
                self.max_iter,
            )
            return None
        if self._early_stop is not None and self._early_stop.reason:
            logger.info(self._early_stop.reason)
            return None
        if comm.is_main_process():
            write_text(Path(self.cfg.OUTPUT_DIR, "config.yaml"), self.cfg.dump())
        try:
            super().train()
        except _StoppedEarly as stop:
            logger.info("%s", stop)
            # After the records are written: a run that is killed before comes here again
            self.checkpointer.save("model_final", iteration=self.iter)
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, self._last_eval_results)
        return getattr(self, "_last_eval_results", None)

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

    def after_step(self) -> None:
        """Average the weights, and call the hooks with what the step logs if they need it."""
        if self._average is not None:
            self._average.update()
        if (self.iter + 1) % WRITE_PERIOD == 0 or self.iter + 1 == self.max_iter:
            self._trainer.write_record()
        super().after_step()
        self._stop_early()

    def _stop_early(self) -> None:
        if self._early_stop is not None and self._early_stop.reason:
            raise _StoppedEarly(self._early_stop.reason)

    def after_train(self) -> None:
        """Call the hooks; a resumed run without a step has ended at its last iteration."""
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def build_hooks(self) -> list[HookBase]:
        """Build Detectron2's hooks, and those of the main process."""
        cfg = self.cfg

        def evaluate() -> dict[str, Any]:
            """Evaluate the current weights and keep the results."""
            self._trainer.write_record()
            with contextlib.nullcontext() if self._average is None else self._average.in_model():
                self._last_eval_results = self.test(cfg, self.model)
            self._evaluated = self.iter
            return self._last_eval_results

        self._evaluation = hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate)
        names = cfg.DATASETS.TEST
        metric = "bbox/AP" if len(names) == 1 else f"{''.join(names[:1])}/bbox/AP"
        self._early_stop = EarlyStop.from_config(cfg, metric)
        everywhere = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            ResidualRamp(cfg.MODEL.DETR.RESIDUAL_RAMP_ITERS),
        ]
        if not comm.is_main_process():
            return [*everywhere, self._evaluation, *filter(None, [self._early_stop])]
        best: HookBase | None = None
        if names and cfg.TEST.EVAL_PERIOD > 0:
            weights = BestWeights(self.model, cfg.OUTPUT_DIR, average=self._average, cfg=cfg)
            best = BestCheckpointer(cfg.TEST.EVAL_PERIOD, weights, metric)
        # Before the evaluation: if that fails, there is a checkpoint.
        checkpoint = hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD)
        after = [best, self._early_stop, RunWriters(cfg.OUTPUT_DIR)]
        return [*everywhere, ProgressBar(), checkpoint, self._evaluation, *filter(None, after)]

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Add hooks; the writers stay last, so that they write what the others log."""
        super().register_hooks(hooks)
        self._hooks.sort(key=lambda hook: isinstance(hook, RunWriters))

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
        log_changes(self.cfg, state_dict.get("schedule", {}))
        seed = state_dict.get("seed", self.cfg.SEED)
        if seed != self.cfg.SEED:
            logger.info("SEED %d of the resumed run is used, not %d", seed, self.cfg.SEED)
            self._reseed(seed)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`miti_detr.engine.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """See :func:`miti_detr.data.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """See :func:`miti_detr.data.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See :func:`miti_detr.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: list[DatasetEvaluator] | None = None,
    ) -> OrderedDict[str, Any]:
        """Evaluate on ``DATASETS.TEST``; writes and logs ``OUTPUT_DIR/inference/coco_table.txt``.

        Args:
            cfg: names the data sets.
            model: with the weights to evaluate.
            evaluators: one for each data set; None: those of :meth:`build_evaluator`, and with
                ``TEST.LOSS`` the validation loss.

        Returns:
            A dict from task to metric to value; with several data sets, one such dict for each
            name. Empty in all processes except the main one.
        """
        names = cfg.DATASETS.TEST
        if cfg.TEST.LOSS and evaluators is None:
            model, losses = with_losses(model)
            evaluators = [DatasetEvaluators([cls.build_evaluator(cfg, x), losses]) for x in names]
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and names:
            by_dataset = {names[0]: results} if len(names) == 1 else results
            write_coco_table(by_dataset, Path(cfg.OUTPUT_DIR, "inference", "coco_table.txt"))
        return results

    def _reseed(self, seed: int) -> None:
        self.cfg.defrost()  # in place: the checkpointers and the guard hold it, too
        self.cfg.SEED = self._trainer.seed = seed
        self.cfg.freeze()
        self._trainer.reset_data_loader(lambda: self.build_train_loader(self.cfg))
