#!/usr/bin/env python
"""Train or evaluate a model, as with Detectron2's own ``train_net.py``.

Examples::

    python train_net.py --config-file configs/shapes/miti_detr.yaml
    python train_net.py --config-file CONFIG --num-gpus 8 SOLVER.BASE_LR 2e-4 OUTPUT_DIR out
    python train_net.py --config-file CONFIG --num-gpus 2 MODEL.DEVICE cpu   # two processes
    torchrun --nproc_per_node 8 train_net.py --config-file CONFIG
    python train_net.py --config-file CONFIG --resume
    python train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS out/model_final.pth
"""

import argparse
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from miti_detr.checkpoint import MitiDetrCheckpointer
from miti_detr.engine import (
    Trainer,
    add_run_arguments,
    log_version,
    prepare_cpu,
    run,
    setup_config,
    setup_run_logger,
)


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config and set up the logs of one process."""
    cfg = setup_config(args.config_file, args.opts)
    cfg.freeze()
    if cfg.MODEL.DEVICE == "cpu":
        prepare_cpu()
    default_setup(cfg, args)
    setup_run_logger(cfg.OUTPUT_DIR)
    log_version()
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Do the work of one process."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = MitiDetrCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = default_argument_parser(__doc__)
    add_run_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
