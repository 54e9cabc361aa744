"""One run of a study, in its own process: ``python -m miti_detr.study.run``.

Takes the arguments of ``train_net.py`` and resumes the run in ``OUTPUT_DIR``.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase, default_argument_parser, default_setup, hooks
from torch import nn

from miti_detr.engine import (
    NonFiniteError,
    Trainer,
    log_version,
    run,
    setup_config,
    setup_run_logger,
)
from miti_detr.engine.hooks import BestCheckpointer, MatchingRecorder, RankHook, StepLog
from miti_detr.engine.parallel import unwrapped
from miti_detr.files import write_text
from miti_detr.modeling import MitiDetr

logger = logging.getLogger(__name__)

START_FILE = "start.json"
FINISHED_FILE = "finished.json"


class StudyTrainer(Trainer):
    """A trainer whose runs leave the same records whether or not they were killed on the way.

    The checkpoint is written after evaluation and metrics instead of before them, so that exactly
    the records after the last checkpoint are repeated. Only that checkpoint is kept.
    """

    def __init__(self, cfg: CfgNode, *, rank_period: int | None = None) -> None:
        """Build the run.

        Args:
            cfg: config of the run.
            rank_period: number of iterations between two measurements of rank collapse; None
                measures nothing.
        """
        self._rank_period = rank_period
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        """Return the trainer's hooks and those of a study, without best weights."""
        cfg = self.cfg
        left_out = (hooks.PeriodicCheckpointer, BestCheckpointer)
        kept = [hook for hook in super().build_hooks() if not isinstance(hook, left_out)]
        measured: list[HookBase] = [StepLog(cfg.OUTPUT_DIR)]
        model = unwrapped(self.model)
        if isinstance(model, MitiDetr):
            if cfg.DATASETS.TEST:
                measured.append(MatchingRecorder(cfg))
            if self._rank_period is not None:
                measured.append(RankHook.on_dataset(cfg, period=self._rank_period))
        else:
            name = type(model).__name__
            logger.info("matching and rank are not recorded: a %s has neither", name)
        checkpoint = hooks.PeriodicCheckpointer(
            self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=1
        )
        # Measurements come before the writers, and these before the checkpoint.
        return [*kept[:-1], *measured, kept[-1], checkpoint, StopWithParent()]


class StopWithParent(HookBase):
    """Stops a run whose study was killed, so that the study can be started again at once."""

    def before_train(self) -> None:
        """Remember the parent process."""
        self._parent = os.getppid()

    def before_step(self) -> None:
        """Stop if the parent process has ended.

        Raises:
            KeyboardInterrupt: it has ended.
        """
        if os.getppid() != self._parent:
            raise KeyboardInterrupt


def weights_digest(model: nn.Module) -> str:
    """Return a hash of the names, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train to the end and write ``finished.json``."""
    cfg = setup_config(args.config_file, args.opts)
    cfg.freeze()
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    default_setup(cfg, args)
    setup_run_logger(cfg.OUTPUT_DIR)
    log_version()
    trainer = StudyTrainer(cfg, rank_period=args.rank_period)
    trainer.resume_or_load(resume=True)
    if trainer.start_iter == 0:
        write_text(folder / START_FILE, json.dumps(_start(trainer)))
    finished = {"iterations": trainer.max_iter, "error": None}
    results = None
    try:
        results = trainer.train()
    except NonFiniteError as error:  # a divergence is a result as well
        finished["error"] = str(error)
    write_text(folder / FINISHED_FILE, json.dumps(finished))
    for checkpoint in folder.glob("model_[0-9]*.pth"):
        checkpoint.unlink()
    return results


def _start(trainer: Trainer) -> dict[str, Any]:
    """Return what a run starts from."""
    images = len(trainer.data_loader.dataset)
    return {
        "weights": weights_digest(trainer.model),
        "parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "iterations_per_epoch": images / trainer.cfg.SOLVER.IMS_PER_BATCH,
    }


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.add_argument("--rank-period", type=int, help="iterations between two measurements")
    # The run of a study that was killed may still be ending.
    sys.exit(run(main, parser.parse_args(), patience=600))
