"""What one process of ``train_net.py`` and ``miti-detr train`` does."""

import argparse
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from miti_detr.checkpoint import MitiDetrCheckpointer

from .cpu import prepare_cpu
from .setup import log_version, setup_config, setup_run_logger
from .short_log import shorten_screen_log
from .trainer import Trainer


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config and set up the logs of one process."""
    cfg = setup_config(args.config_file, args.opts)
    cfg.freeze()
    if cfg.MODEL.DEVICE == "cpu":
        prepare_cpu()
    if getattr(args, "short_log", False):
        shorten_screen_log(cfg.OUTPUT_DIR)
    default_setup(cfg, args)
    setup_run_logger(cfg.OUTPUT_DIR)
    log_version()
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or evaluate with ``args.eval_only``; the work of one process.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Returns:
        The results of the last evaluation; None if there was none.
    """
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = MitiDetrCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()
