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

from miti_detr.accelerate import uncompiled
from miti_detr.data import build_test_loader, build_train_loader
from miti_detr.data.kept_features import FeatureStore
from miti_detr.data.loader import training_records
from miti_detr.evaluation import (
    MitiDetrWithTTA,
    best_metric,
    build_evaluator,
    tta_config,
    write_coco_table,
)
from miti_detr.files import write_text

from .checkpointers import BestWeights, RunCheckpointer
from .features import check_frozen, keep_features
from .hooks import (
    WRITE_PERIOD,
    BestCheckpointer,
    EarlyStop,
    NonFiniteGuard,
    Plan,
    ProgressBar,
    ResidualRamp,
    RunWriters,
)
from .hooks.loggers import build_loggers
from .optimizer import build_optimizer
from .parallel import unwrapped, wrap_for_processes
from .resumable_trainer import ResumableTrainer, StoppedEarly
from .resume import has_final_results
from .seed import resolve_seed
from .solver import (
    WeightAverage,
    build_scheduler,
    freeze,
    frozen_norms,
    num_images,
    resolve_schedule,
    scale_to_batch,
)
from .step.micro_batch import choose_parts
from .step.train_step import TrainStep
from .validation import with_losses

logger = logging.getLogger(__name__)


class Trainer(ResumableTrainer):
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
        freeze(cfg, model)
        self._features = None
        if cfg.MODEL.BACKBONE.CACHE_FEATURES:
            check_frozen(model)
            self._features = FeatureStore(cfg)
            data_loader = build_train_loader(cfg, self._features)
        else:
            data_loader = self.build_train_loader(cfg)
        scale_to_batch(cfg)
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
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def train(self) -> OrderedDict[str, Any] | None:
        """Train to ``SOLVER.MAX_ITER`` and evaluate.

        A run that is finished and evaluated is not changed.

        Returns:
            The last evaluation results; None if there are none.
        """
        has_results = not self.cfg.DATASETS.TEST or has_final_results(
            self.cfg.OUTPUT_DIR, self.max_iter, best_metric(self.cfg)
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
        if self.cfg.SOLVER.ACCUMULATE == 0:
            self._use_parts(choose_parts(self.cfg, self._trainer))
        if comm.is_main_process():
            write_text(Path(self.cfg.OUTPUT_DIR, "config.yaml"), self.cfg.dump())
        if self.cfg.OUTPUT_NOTE:
            logger.info("note: %s", self.cfg.OUTPUT_NOTE)
        if self._features is not None:
            keep_features(self._features, unwrapped(self.model), training_records(self.cfg))
        try:
            super().train()
        except StoppedEarly as stop:
            logger.info("%s", stop)
            # After the records are written: a run that is killed before comes here again
            self.checkpointer.save("model_final", iteration=self.iter)
            if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
                verify_results(self.cfg, self._last_eval_results)
        return getattr(self, "_last_eval_results", None)

    def after_step(self) -> None:
        """Average the weights, and call the hooks with what the step logs if they need it."""
        if self._average is not None:
            self._average.update()
        if (self.iter + 1) % WRITE_PERIOD == 0 or self.iter + 1 == self.max_iter:
            self._trainer.write_record()
        super().after_step()
        self._stop_early()

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
            averaged = self._average.in_model() if self._average else contextlib.nullcontext()
            with averaged, uncompiled():  # for evaluation, everything would be compiled again
                self._last_eval_results = self.test(cfg, self.model)
                if cfg.TEST.AUG.ENABLED and self.iter + 1 >= self.max_iter:
                    self._last_eval_results.update(self.test_with_TTA(cfg, self.model))
            self._evaluated = self.iter
            return self._last_eval_results

        self._evaluation = hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate)
        self._plan = Plan(cfg, num_images(self.data_loader))
        names = cfg.DATASETS.TEST
        metric = best_metric(cfg) if len(names) == 1 else f"{''.join(names[:1])}/{best_metric(cfg)}"
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
        writers = RunWriters(cfg.OUTPUT_DIR, others=build_loggers(cfg))
        after = [best, self._early_stop, writers]
        everywhere += [self._plan, ProgressBar()]
        return [*everywhere, checkpoint, self._evaluation, *filter(None, after)]

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Add hooks; the writers stay last, so that they write what the others log."""
        super().register_hooks(hooks)
        self._hooks.sort(key=lambda hook: isinstance(hook, RunWriters))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`miti_detr.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """See :func:`miti_detr.engine.solver.build_scheduler`."""
        return build_scheduler(cfg, optimizer)

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

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> OrderedDict[str, Any]:
        """Evaluate with test-time augmentation, under the name of Detectron2's ``train_net.py``.

        Args:
            cfg: as for :meth:`test`, with the views of ``TEST.AUG``.
            model: with the weights to evaluate.

        Returns:
            As :meth:`test`, with ``_TTA`` at the end of the names, such as ``bbox_TTA``. Files are
            in ``OUTPUT_DIR/TTA``.
        """
        cfg = tta_config(cfg)
        logger.info("evaluating with test-time augmentation")
        results = cls.test(cfg, MitiDetrWithTTA(cfg, unwrapped(model)))
        return OrderedDict((f"{name}_TTA", value) for name, value in results.items())
